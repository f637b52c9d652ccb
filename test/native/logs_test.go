package native

import (
	"bufio"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/cloudos-io/cloudos/test/harness"
)

// syslogd takes lines over tcp; it can go away and come back.
type syslogd struct {
	t    *testing.T
	addr string
	l    net.Listener
	mu   sync.Mutex
	got  []string
	cons []net.Conn
}

func (s *syslogd) open() {
	s.t.Helper()
	l, err := net.Listen("tcp", s.addr)
	if err != nil {
		s.t.Fatal(err)
	}
	s.l, s.addr = l, l.Addr().String()
	s.t.Cleanup(s.shut)
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			s.mu.Lock()
			s.cons = append(s.cons, c)
			s.mu.Unlock()
			go func() {
				sc := bufio.NewScanner(c)
				for sc.Scan() {
					s.mu.Lock()
					s.got = append(s.got, sc.Text())
					s.mu.Unlock()
				}
			}()
		}
	}()
}

func (s *syslogd) shut() {
	s.l.Close()
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range s.cons {
		c.Close()
	}
	s.cons = nil
}

// of returns the messages with a tag, each once: a batch may come twice after a
// break.
func (s *syslogd) of(tag string) []string {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []string
	for _, l := range s.got {
		if _, msg, ok := strings.Cut(l, " "+tag+" - "); ok && !slices.Contains(out, msg) {
			out = append(out, msg)
		}
	}
	return out
}

func numbers(from, to int) []string {
	var l []string
	for i := from; i <= to; i++ {
		l = append(l, fmt.Sprintf("n%d", i))
	}
	return l
}

func TestRemoteLogsOutliveEngineAndRemote(t *testing.T) {
	in := &syslogd{t: t, addr: "127.0.0.1:0"}
	in.open()
	e := start(t)
	opt := []string{"--log-driver", "syslog", "--log-opt", "syslog-address=tcp://" + in.addr, "--log-opt", "syslog-format=rfc5424", "--log-opt", "tag={{.Name}}"}
	run := func(args ...string) { e.must(append(append([]string{"run", "--network", "none"}, opt...), args...)...) }
	run("-d", "--name", "one", "bb", "sh", "-c", `i=0; while [ $i -lt 30 ]; do i=$((i+1)); echo n$i; while [ ! -e /go$((i/10)) ]; do sleep 0.02; done; done; sleep 1000`)
	go1 := func(n int) { e.must("exec", "one", "touch", fmt.Sprintf("/go%d", n)) }
	go1(0)
	harness.Eventually(t, "ten lines at the remote", 20*time.Second, func() bool { return len(in.of("one")) == 10 })
	in.shut()
	go1(1)
	harness.Eventually(t, "twenty lines in the cache", 20*time.Second, func() bool { return strings.Count(e.must("logs", "one"), "\n") == 19 })
	// A container that is gone when the remote comes back.
	run("--rm", "--name", "two", "bb", "sh", "-c", "echo last words; echo oops >&2")
	harness.Eventually(t, "info tells of the trouble", 20*time.Second, func() bool { r := e.run("info"); return strings.Contains(r.out+r.err, "cannot be sent") })
	e.Kill()
	in.open()
	e.Boot()
	harness.Eventually(t, "what was written meanwhile", 20*time.Second, func() bool { return len(in.of("one")) >= 20 && len(in.of("two")) >= 2 })
	go1(2)
	go1(3)
	harness.Eventually(t, "the rest", 20*time.Second, func() bool { return len(in.of("one")) >= 30 })
	if got := in.of("one"); !slices.Equal(got, numbers(1, 30)) {
		t.Errorf("got %q", got)
	}
	if got := in.of("two"); !slices.Equal(got, []string{"last words", "oops"}) && !slices.Equal(got, []string{"oops", "last words"}) {
		t.Errorf("of the container that is gone: %q", got)
	}
	if got := e.must("logs", "--tail", "2", "one"); got != "n29\nn30" {
		t.Errorf("logs read back %q", got)
	}
	e.must("rm", "-f", "one")
	harness.Eventually(t, "the logs go", 20*time.Second, func() bool {
		l, err := os.ReadDir(e.Dir + "/root/remote-logs")
		return err == nil && len(l) == 0
	})
}

func TestLogOptions(t *testing.T) {
	e := start(t)
	for args, want := range map[string]string{
		"--log-driver=nosuch":                                           "logger: no log driver named 'nosuch' is registered",
		"--log-driver=syslog --log-opt=nosuch=1":                        "unknown log opt 'nosuch' for syslog log driver",
		"--log-driver=journald":                                         "journald is not enabled on this host",
		"--log-driver=fluentd --log-opt=fluentd-address=ftp://x":        "invalid fluentd-address",
		"--log-opt=mode=sometimes":                                      "logger: logging mode not supported: sometimes",
		"--log-opt=max-buffer-size=1m":                                  "logger: max-buffer-size option is only supported with 'mode=non-blocking'",
		"--log-opt=tag={{.NoSuch}} --log-driver=fluentd":                "invalid log tag",
		"--log-driver=syslog --log-opt=syslog-address=unix:///no/such/": "unable to stat syslog-address",
	} {
		r := e.run(append(append([]string{"run", "--rm", "--network", "none"}, strings.Fields(args)...), "bb", "true")...)
		if r.code == 0 || !strings.Contains(r.err, want) {
			t.Errorf("%s: %s, want %q", args, r, want)
		}
	}
	e.must("run", "--network", "none", "--name", "quiet", "--log-driver", "fluentd", "--log-opt", "cache-disabled=true", "bb", "echo", "x")
	if r := e.run("logs", "quiet"); r.code == 0 || !strings.Contains(r.err, "configured logging driver does not support reading") {
		t.Errorf("logs of a disabled cache: %s", r)
	}
	e.must("run", "--network", "none", "--name", "tagged", "--log-opt", "tag=shop", "--log-opt", "labels=team", "--label", "team=red", "bb", "echo", "x")
	if got := e.must("logs", "--details", "tagged"); !strings.Contains(got, "tag=shop") || !strings.Contains(got, "team=red") {
		t.Errorf("details: %q", got)
	}
	if got := e.must("info"); !strings.Contains(got, "fluentd journald json-file k8s-file local none syslog") {
		t.Errorf("info: %s", got)
	}
	e.must("rm", "quiet")
}
