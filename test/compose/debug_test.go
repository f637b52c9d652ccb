package compose

import (
	"strings"
	"testing"
)

// TestDebug looks into containers of several kinds.
func TestDebug(t *testing.T) {
	p := newProject(t, `
services:
  plain: {image: bb, command: sh -c 'echo mine > /v/f; exec sleep 1000', volumes: ["vol:/v"], stop_grace_period: 0s}
  bare: {image: servin/hello, command: serve, stop_grace_period: 0s}
  strict: {image: bb, command: sleep 1000, read_only: true, user: web, cap_drop: [ALL], security_opt: ["no-new-privileges:true"], stop_grace_period: 0s}
  own-ids: {image: bb, command: sleep 1000, userns_mode: auto, stop_grace_period: 0s}
  ended: {image: bb, command: sh -c 'echo dead > /f; exit 3'}
volumes: {vol: {}}
`)
	p.must("up", "-d")
	debug := func(service string, cmd ...string) string {
		t.Helper()
		return p.servin(append([]string{"debug", p.name + "-" + service + "-1"}, cmd...)...)
	}
	if got := debug("plain", "cat", "/target/v/f"); got != "mine" {
		t.Errorf("the volume's file is %q", got)
	}
	debug("plain", "sh", "-c", "echo written > /target/tmp/w")
	p.want("written", "exec", "-T", "plain", "cat", "/tmp/w")
	if got, want := debug("plain", "hostname"), p.must("exec", "-T", "plain", "hostname"); got != want {
		t.Errorf("the host's name is %q, want %q", got, want)
	}
	if got, want := debug("plain", "sh", "-c", "ip -o -4 addr show dev eth0 | awk '{print $4}'"), p.must("exec", "-T", "plain", "sh", "-c", "ip -o -4 addr show dev eth0 | awk '{print $4}'"); got != want {
		t.Errorf("the address is %q, want %q", got, want)
	}
	if got := debug("bare", "ls", "/target/servin-hello"); got != "/target/servin-hello" {
		t.Errorf("got %q", got)
	}
	debug("strict", "ls", "/target/etc/passwd")
	// Processes of the container alone: the host's are none of its business.
	for _, s := range []string{"plain", "bare", "own-ids"} {
		if got := strings.Count(debug(s, "ps"), "\n"); got < 2 || got > 4 {
			t.Errorf("%s: ps shows %d lines", s, got)
		}
	}
	debug("own-ids", "sh", "-c", "echo x > /target/w")
	p.want("x", "exec", "-T", "own-ids", "cat", "/w")
	p.eventually("it has ended", func() bool { return p.must("ps", "-aq", "--status", "exited", "ended") != "" })
	if got := debug("ended", "cat", "/target/f"); got != "dead" {
		t.Errorf("got %q", got)
	}
	if c := p.exec(p.e.bin+"/servin", "debug", p.name+"-ended-1", "touch", "/target/x"); c.code == 0 {
		t.Error("files of one that has ended can be written")
	}
	if c := p.exec(p.e.bin+"/servin", "debug", p.name+"-plain-1", "sh", "-c", "exit 5"); c.code != 5 {
		t.Errorf("want 5: %s", c)
	}
	if c := p.exec(p.e.bin+"/servin", "debug", "nonsense"); c.code != 125 || !strings.Contains(c.err, "No such container") {
		t.Error(c)
	}
	// It ends with the one that it looks into, and leaves nothing.
	b := p.background("servin", "debug", p.name+"-plain-1", "sh", "-c", "echo here; sleep 1000")
	b.says("here")
	if out := p.servin("ps", "--filter", "label=io.servin.debug", "-q"); len(strings.Fields(out)) != 1 {
		t.Errorf("ps shows %q", out)
	}
	p.must("kill", "plain")
	if code := b.ends(); code != 137 {
		t.Errorf("it ended with %d", code)
	}
	p.eventually("sessions are removed", func() bool { return p.servin("ps", "-aq", "--filter", "label=io.servin.debug") == "" })
}

func TestServinWatch(t *testing.T) {
	p := newProject(t, "services:\n  app: {image: bb, command: sleep 1000, stop_grace_period: 0s}\n", "src/a", "1", "src/b.log", "1")
	p.must("up", "-d")
	b := p.background("servin", "watch", p.name+"-app-1", "--sync", "src:/app", "--ignore", "*.log", "--initial", "--exec", "cat /app/a > /seen")
	b.says("watching")
	p.want("a", "exec", "-T", "app", "ls", "/app")
	p.write("src/a", "2")
	p.eventually("the command saw it", func() bool {
		c := p.run("exec", "-T", "app", "cat", "/seen")
		return c.code == 0 && strings.TrimSpace(c.out) == "2"
	})
}
