package build

import (
	"context"
	"io"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/build/contract"
)

// TestHandEndsWithItsContext has a builder that keeps the client's connection: the
// engine, when it stops, waits for it no longer than for other long requests.
func TestHandEndsWithItsContext(t *testing.T) {
	b := New(Config{Logger: slog.New(slog.DiscardHandler), Settings: contract.Settings{Root: t.TempDir(), RunRoot: t.TempDir()}})
	ours, theirs, err := handPair()
	if err != nil {
		t.Fatal(err)
	}
	defer ours.Close()
	defer theirs.Close()
	base, stop := context.WithCancel(t.Context())
	returned := make(chan struct{})
	srv := &http.Server{
		BaseContext: func(net.Listener) context.Context { return base },
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			defer close(returned)
			request, err := wholeRequest(r)
			if request == nil {
				t.Errorf("the connection is not handed over: %v", err)
				return
			}
			b.hand(w, r, ours, request)
		}),
	}
	l, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	go func() { _ = srv.Serve(l) }()
	defer srv.Close()
	c, err := net.Dial("unix", l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := io.WriteString(c, "POST /session HTTP/1.1\r\nHost: e\r\nConnection: Upgrade\r\nUpgrade: h2c\r\n\r\n"); err != nil {
		t.Fatal(err)
	}
	builder, err := net.FileConn(theirs)
	if err != nil {
		t.Fatal(err)
	}
	defer builder.Close()
	got, rights := make([]byte, contract.MaxHanded), make([]byte, unix.CmsgSpace(2*4))
	n, held, _, _, err := builder.(*net.UnixConn).ReadMsgUnix(got, rights)
	if msgs, perr := unix.ParseSocketControlMessage(rights[:held]); perr == nil && len(msgs) == 1 {
		fds, _ := unix.ParseUnixRights(&msgs[0])
		for _, fd := range fds {
			defer unix.Close(fd)
		}
	}
	if err != nil || !strings.HasPrefix(string(got[:n]), "POST /session HTTP/1.1\r\n") {
		t.Fatalf("%q %v", got[:n], err)
	}
	stop()
	select {
	case <-returned:
	case <-time.After(20 * time.Second):
		t.Fatal("it goes on after its context's end")
	}
}
