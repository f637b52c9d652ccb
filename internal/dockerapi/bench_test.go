package dockerapi

import (
	"context"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"strings"
	"testing"

	"github.com/moby/moby/api/types/container"

	"github.com/cloudos-io/cloudos/api"
)

// BenchmarkRun is the edge's share of a run: a fresh connection, the request as
// the command line sends it, frames, and the end.
func BenchmarkRun(b *testing.B) {
	f := &fake{attached: func() Attached {
		return Attached{Stdout: strings.NewReader("hello\n"), Stderr: strings.NewReader(""), Close: func() error { return nil }}
	}}
	f.wait = make(chan container.WaitResponse, 1)
	body := js(api.RunRequest{
		Config:     &container.Config{Image: "busybox", Cmd: []string{"/bin/true"}, Labels: map[string]string{}},
		HostConfig: &container.HostConfig{AutoRemove: true}, Stdout: true, Stderr: true,
	})
	path := filepath.Join(b.TempDir(), "s")
	l, err := Listen("unix://"+path, ListenOptions{})
	if err != nil {
		b.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	h := handlerOf(f)
	go func() { done <- Serve(ctx, []net.Listener{l}, h) }()
	defer func() { cancel(); <-done }()
	req := fmt.Sprintf("POST /servin/run HTTP/1.1\r\nHost: d\r\nConnection: Upgrade\r\nUpgrade: tcp\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s", len(body), body)
	b.ReportAllocs()
	for b.Loop() {
		f.wait <- container.WaitResponse{}
		c, err := net.Dial("unix", path)
		if err != nil {
			b.Fatal(err)
		}
		if _, err := io.WriteString(c, req); err != nil {
			b.Fatal(err)
		}
		if out, err := io.ReadAll(c); err != nil || !strings.HasSuffix(string(out), `{"ExitCode":0}`) {
			b.Fatalf("%q %v", out, err)
		}
		c.Close()
		f.calls = f.calls[:0]
	}
}
