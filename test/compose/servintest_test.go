package compose

import (
	"context"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/cloudos-io/cloudos/servintest"
)

func TestServintest(t *testing.T) {
	t.Setenv("SERVIN_HOST", shared.host)
	ctx := t.Context()
	n := servintest.Network(t)
	c := servintest.Run(t, servintest.Request{
		Image: "bb", Cmd: []string{"sh", "-c", "echo $GREETING; mkdir /www; cp /etc/page /www/index.html; exec httpd -f -p 80 -h /www"},
		Env: map[string]string{"GREETING": "hello"}, Ports: []string{"80"}, Files: map[string][]byte{"/etc/page": []byte("a page")},
		Networks: []string{n}, Aliases: []string{"web"},
		Wait: servintest.All(servintest.ForLog("hello"), servintest.ForPort("80"), servintest.ForHTTP("80", "/"), servintest.ForExec("true")),
	})
	resp, err := http.Get("http://" + c.Address("80") + "/")
	if err != nil {
		t.Fatal(err)
	}
	resp.Body.Close()
	if resp.StatusCode != 200 {
		t.Errorf("got %s", resp.Status)
	}
	if b, err := c.ReadFile(ctx, "/www/index.html"); err != nil || string(b) != "a page" {
		t.Errorf("got %q, %v", b, err)
	}
	other := servintest.Run(t, servintest.Request{Image: "bb", Cmd: []string{"wget", "-qO-", "http://web/"}, Networks: []string{n}, Wait: servintest.ForExit()})
	if log, err := other.Logs(ctx); err != nil || log != "a page" {
		t.Errorf("got %q, %v", log, err)
	}
	r, err := c.Exec(ctx, "sh", "-c", "echo out; echo err >&2; exit 3")
	if err != nil || r.Stdout != "out\n" || r.Stderr != "err\n" || r.ExitCode != 3 {
		t.Errorf("got %+v, %v", r, err)
	}
	// What does not become ready says why.
	for name, c := range map[string]struct {
		req  servintest.Request
		want string
	}{
		"ends": {servintest.Request{Image: "bb", Cmd: []string{"sh", "-c", "echo oh; exit 3"}, Wait: servintest.ForLog("never")}, "code 3"},
		"slow": {servintest.Request{Image: "bb", Cmd: []string{"sh", "-c", "echo still; sleep 100"}, Wait: servintest.ForLog("never"), Timeout: 500 * time.Millisecond}, "still"},
		"port": {servintest.Request{Image: "bb", Cmd: []string{"sleep", "100"}, Ports: []string{"80"}, Wait: servintest.ForPort("80"), Timeout: 500 * time.Millisecond}, "port 80"},
	} {
		got, err := servintest.Start(ctx, c.req)
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: got %v", name, err)
		}
		if got != nil {
			if err := got.Remove(ctx); err != nil {
				t.Error(err)
			}
		}
	}
	if _, err := servintest.Start(ctx, servintest.Request{Image: "bb", Ports: []string{"nonsense"}}); err == nil {
		t.Error("a malformed port passes")
	}
}

// TestLeaseOfAKilledProcess has a process that holds a container killed: the
// engine removes the container.
func TestLeaseOfAKilledProcess(t *testing.T) {
	if id := os.Getenv("SERVINTEST_CHILD"); id != "" {
		c, err := servintest.Start(context.Background(), servintest.Request{Image: "bb", Cmd: []string{"sleep", "1000"}})
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(id, []byte(c.ID), 0o600); err != nil {
			t.Fatal(err)
		}
		select {}
	}
	file := filepath.Join(t.TempDir(), "id")
	cmd := exec.Command(os.Args[0], "-test.run", "^TestLeaseOfAKilledProcess$")
	cmd.Env = append(os.Environ(), "SERVINTEST_CHILD="+file, "SERVIN_HOST="+shared.host, "SERVIN_BIN="+shared.bin)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p := &project{t: t, e: shared}
	p.eventually("the process has its container", func() bool { b, _ := os.ReadFile(file); return len(b) == 64 })
	b, _ := os.ReadFile(file)
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	p.eventually("the container is gone", func() bool {
		_, _, err := shared.c.ContainerInspect(context.Background(), string(b), false)
		return err != nil
	})
}
