package native

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cloudos-io/cloudos/test/harness"
)

func TestExitCodes(t *testing.T) {
	e := start(t)
	for _, c := range []struct {
		args []string
		code int
	}{
		{[]string{"run", "--rm", "bb", "true"}, 0},
		{[]string{"run", "--rm", "bb", "sh", "-c", "exit 7"}, 7},
		{[]string{"run", "--rm", "bb", "sh", "-c", "sh -c 'kill -9 $$'; exit $?"}, 137},
		{[]string{"run", "--rm", "bb", "/nothing-there"}, 127},
		{[]string{"run", "--rm", "bb", "/etc/passwd"}, 126},
		{[]string{"run", "--rm", "--no-such-flag", "bb"}, 125},
		{[]string{"run", "--rm", "--pull", "never", "no/such:image"}, 125},
		{[]string{"run", "--rm", "-m", "1k", "bb", "true"}, 125},
		{[]string{"run", "--rm", "--entrypoint", "/bin/false", "bb"}, 1},
	} {
		if r := e.run(c.args...); r.code != c.code {
			t.Errorf("%s: want exit %d, got %s", strings.Join(c.args, " "), c.code, r)
		}
	}
	if out := e.must("ps", "-aq"); out != "" {
		t.Errorf("containers left: %q", out)
	}
	// What a user may not execute he does not; where he begins may be closed to him.
	e.must("run", "--name", "closed", "bb", "sh", "-c", "cp /bin/busybox /bin/priv; chmod 700 /bin/priv; mkdir -m 700 /secret; cp /bin/busybox /secret/sh")
	e.must("commit", "closed", "closed")
	e.must("run", "-d", "--name", "up", "--user", "1000", "closed", "sleep", "1000")
	for _, c := range []struct {
		args []string
		code int
	}{
		{[]string{"run", "--rm", "--user", "1000", "closed", "/bin/priv", "true"}, 126},
		{[]string{"run", "--rm", "--user", "1000", "closed", "priv", "true"}, 126},
		{[]string{"run", "--rm", "--user", "1000", "closed", "/secret/sh", "-c", "true"}, 126},
		{[]string{"run", "--rm", "--user", "1000", "--init", "closed", "/secret/sh", "-c", "true"}, 126},
		{[]string{"run", "--rm", "--user", "1000", "-w", "/secret", "closed", "sh", "-c", "! ls ."}, 0},
		{[]string{"run", "--rm", "--user", "1000", "-w", "/secret", "--cap-drop", "all", "closed", "true"}, 0},
		{[]string{"exec", "up", "/bin/priv", "true"}, 126},
		{[]string{"exec", "--privileged", "up", "/bin/priv", "true"}, 126},
		{[]string{"exec", "--user", "0", "up", "/secret/sh", "-c", "grep -q 'CapEff:.*a80425fb' /proc/self/status && chown 5 /tmp"}, 0},
		{[]string{"exec", "up", "sh", "-c", "grep -q 'CapEff:.*0000000000000000' /proc/self/status && ! chown 5 /tmp"}, 0},
	} {
		if r := e.run(c.args...); r.code != c.code {
			t.Errorf("%s: want exit %d, got %s", strings.Join(c.args, " "), c.code, r)
		}
	}
}

func TestStreams(t *testing.T) {
	e := start(t)
	r := e.run("run", "--rm", "bb", "sh", "-c", "echo out; echo err >&2")
	if r.out != "out\n" || r.err != "err\n" || r.code != 0 {
		t.Errorf("streams mixed: %s", r)
	}
	big := strings.Repeat("0123456789abcde\n", 1<<16)
	if r := e.pipe(strings.NewReader(big), "run", "--rm", "-i", "bb", "cat"); r.out != big {
		t.Errorf("1 MiB through cat came back as %d bytes, exit %d, %s", len(r.out), r.code, r.err)
	}
	e.must("run", "-d", "--name", "xx", "bb", "sleep", "1000")
	if r := e.pipe(strings.NewReader(big), "exec", "-i", "xx", "cat"); r.out != big {
		t.Errorf("1 MiB through exec cat came back as %d bytes, exit %d, %s", len(r.out), r.code, r.err)
	}
	if r := e.run("exec", "xx", "sh", "-c", "echo o; echo e >&2; exit 5"); r.code != 5 || r.out != "o\n" || r.err != "e\n" {
		t.Errorf("exec: %s", r)
	}
	for cmd, code := range map[string]int{"/nothing": 127, "/etc/passwd": 126} {
		if r := e.run("exec", "xx", cmd); r.code != code {
			t.Errorf("exec %s: want %d, got %s", cmd, code, r)
		}
	}
}

func TestLifecycle(t *testing.T) {
	e := start(t)
	id := e.must("create", "--name", "cc", "bb", "sh", "-c", "trap 'exit 3' TERM; echo ready; while :; do sleep 0.05; done")
	if len(id) != 64 {
		t.Fatalf("id %q", id)
	}
	e.must("start", "cc")
	harness.Eventually(t, "log line", 5*time.Second, func() bool { return strings.Contains(e.must("logs", "cc"), "ready") })
	state := func() string { return e.must("inspect", "--format", "{{.State.Status}} {{.State.ExitCode}}", "cc") }
	if s := state(); s != "running 0" {
		t.Errorf("state %q", s)
	}
	e.must("pause", "cc")
	if s := state(); s != "paused 0" {
		t.Errorf("state %q", s)
	}
	e.must("unpause", "cc")
	e.must("rename", "cc", "dd")
	if out := e.must("ps", "--format", "{{.Names}}"); out != "dd" {
		t.Errorf("ps says %q", out)
	}
	e.must("stop", "-t", "5", "dd")
	if s := e.must("inspect", "--format", "{{.State.Status}} {{.State.ExitCode}}", "dd"); s != "exited 3" {
		t.Errorf("after stop: %q", s)
	}
	e.must("restart", "-t", "1", "dd")
	e.must("kill", "-s", "KILL", "dd")
	if out := e.must("wait", "dd"); out != "137" {
		t.Errorf("wait says %q", out)
	}
	e.must("rm", "dd")
	if r := e.run("inspect", "dd"); r.code == 0 {
		t.Error("inspect of a removed container succeeded")
	}
}

func TestRestartPolicy(t *testing.T) {
	e := start(t)
	e.must("run", "-d", "--name", "rr", "--restart", "on-failure:2", "bb", "sh", "-c", "echo once; exit 4")
	harness.Eventually(t, "three runs", 20*time.Second, func() bool {
		return e.must("inspect", "--format", "{{.RestartCount}} {{.State.Status}}", "rr") == "2 exited"
	})
	if n := strings.Count(e.must("logs", "rr"), "once"); n != 3 {
		t.Errorf("ran %d times, want 3", n)
	}
	e.must("run", "-d", "--name", "always", "--restart", "always", "bb", "sleep", "1000")
	pid := e.must("inspect", "--format", "{{.State.Pid}}", "always")
	if err := os.WriteFile("/dev/null", nil, 0); err != nil {
		t.Fatal(err)
	}
	if r := e.run("exec", "always", "kill", "-9", "1"); r.code > 137 {
		t.Errorf("exec kill: %s", r)
	}
	// A process cannot kill its own pid 1 from inside; from the host it can.
	e.must("kill", "-s", "KILL", "always")
	time.Sleep(300 * time.Millisecond)
	if s := e.must("inspect", "--format", "{{.State.Status}}", "always"); s != "exited" {
		t.Errorf("a container killed by its user must stay down, is %q (pid was %s)", s, pid)
	}
}

func TestResources(t *testing.T) {
	e := start(t)
	e.must("run", "-d", "--name", "mm", "-m", "64m", "--pids-limit", "20", "--cpus", "0.5", "bb", "sleep", "1000")
	var got []struct {
		HostConfig struct{ Memory, NanoCpus, PidsLimit int64 }
	}
	if err := json.Unmarshal([]byte(e.must("inspect", "mm")), &got); err != nil {
		t.Fatal(err)
	}
	if h := got[0].HostConfig; h.Memory != 64<<20 || h.NanoCpus != 5e8 || h.PidsLimit != 20 {
		t.Errorf("limits %+v", h)
	}
	if r := e.run("exec", "mm", "sh", "-c", "for i in $(seq 40); do sleep 5 & done; wait"); !strings.Contains(r.err, "fork") {
		t.Errorf("the pids limit did not bite: %s", r)
	}
	e.must("update", "-m", "128m", "--memory-swap", "128m", "mm")
	if out := e.must("inspect", "--format", "{{.HostConfig.Memory}}", "mm"); out != fmt.Sprint(128<<20) {
		t.Errorf("updated memory %s", out)
	}
	r := e.run("run", "--name", "oom", "-m", "16m", "--memory-swap", "16m", "bb", "sh", "-c", "head -c 100m /dev/zero | tail")
	if r.code == 0 {
		t.Errorf("100 MB in 16 MB: %s", r)
	}
}

func TestVolumes(t *testing.T) {
	e := start(t)
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "f"), []byte("host\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	if out := e.must("run", "--rm", "-v", dir+":/d:ro", "bb", "cat", "/d/f"); out != "host" {
		t.Errorf("bind: %q", out)
	}
	if r := e.run("run", "--rm", "-v", dir+":/d:ro", "bb", "sh", "-c", "echo x > /d/f"); r.code == 0 || !strings.Contains(r.err, "Read-only") {
		t.Errorf("ro bind written: %s", r)
	}
	e.must("run", "--rm", "-v", "data:/d", "bb", "sh", "-c", "echo kept > /d/f")
	if out := e.must("run", "--rm", "-v", "data:/d", "bb", "cat", "/d/f"); out != "kept" {
		t.Errorf("volume: %q", out)
	}
	if out := e.must("run", "--rm", "--tmpfs", "/t:size=1m", "bb", "sh", "-c", "df -k /t | tail -1 | awk '{print $2}'"); out != "1024" {
		t.Errorf("tmpfs of 1 MiB has %s KiB", out)
	}
	if out := e.must("volumes", "ls", "-q"); out != "data" {
		t.Errorf("volumes: %q", out)
	}
	e.must("volumes", "rm", "data")
	if r := e.run("run", "--rm", "--mount", "type=bind,source=/does/not/exist,target=/x", "bb", "true"); r.code != 125 {
		t.Errorf("missing bind source: %s", r)
	}
}

func TestCopy(t *testing.T) {
	e := start(t)
	dir := t.TempDir()
	e.must("run", "-d", "--name", "cc", "bb", "sh", "-c", "mkdir /in; echo deep > /in/f; ln -s /etc /in/l; sleep 1000")
	harness.Eventually(t, "file", 5*time.Second, func() bool { return e.run("exec", "cc", "test", "-e", "/in/l").code == 0 })
	e.must("cp", "cc:/in", dir)
	if data, err := os.ReadFile(dir + "/in/f"); err != nil || string(data) != "deep\n" {
		t.Errorf("copied out: %q, %v", data, err)
	}
	e.must("cp", dir+"/in/f", "cc:/tmp/g")
	if out := e.must("exec", "cc", "cat", "/tmp/g"); out != "deep" {
		t.Errorf("copied in: %q", out)
	}
	// A link that points outside must lead inside.
	e.must("exec", "cc", "sh", "-c", "ln -s /../../../../etc /esc")
	e.must("cp", dir+"/in/f", "cc:/esc/planted")
	if _, err := os.Stat("/etc/planted"); err == nil {
		t.Error("cp followed a link out of the container")
		_ = os.Remove("/etc/planted")
	}
	e.must("stop", "-t", "0", "cc")
	e.must("cp", "cc:/tmp/g", dir+"/h")
	if out := e.must("diff", "cc"); !strings.Contains(out, "A /in/f") {
		t.Errorf("diff: %q", out)
	}
	e.must("commit", "cc", "made:1")
	if out := e.must("run", "--rm", "made:1", "cat", "/in/f"); out != "deep" {
		t.Errorf("committed: %q", out)
	}
}
