package build

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/containerd/containerd/v2/pkg/namespaces"
	"github.com/containerd/errdefs"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"

	"github.com/cloudos-io/cloudos/internal/build/contract"
	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/image"
)

func TestOneConn(t *testing.T) {
	a, b := net.Pipe()
	defer a.Close()
	l := &oneConn{conn: b, done: make(chan struct{})}
	if c, err := l.Accept(); err != nil || c != b {
		t.Fatalf("first: %v, %v", c, err)
	}
	_ = l.Close()
	_ = l.Close()
	if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
		t.Errorf("after Close: %v", err)
	}
}

func TestNamespaces(t *testing.T) {
	for ns, ok := range map[string]bool{"": true, image.Namespace: true, contract.HistoryNamespace: false, "moby": false, "k8s.io": false} {
		ctx := context.Background()
		if ns != "" {
			ctx = namespaces.WithNamespace(ctx, ns)
		}
		got, err := inNamespace(ctx)
		if (err == nil) != ok {
			t.Errorf("%q: %v", ns, err)
			continue
		}
		if !ok {
			continue
		}
		if n, _ := namespaces.Namespace(got); n == "" {
			t.Errorf("%q: no namespace", ns)
		}
	}
}

func TestNotInstalled(t *testing.T) {
	t.Setenv("PATH", t.TempDir())
	b := New(Config{Logger: slog.New(slog.DiscardHandler), Settings: contract.Settings{Root: t.TempDir(), RunRoot: t.TempDir()}})
	if b.Installed() {
		t.Skip("SKIP: servin-buildd is beside this test")
	}
	w := httptest.NewRecorder()
	b.ServeHTTP(w, httptest.NewRequest(http.MethodPost, "/build", strings.NewReader("")))
	if w.Code != http.StatusNotImplemented || !strings.Contains(w.Body.String(), "servin-buildd") {
		t.Errorf("%d %s", w.Code, w.Body)
	}
	if du, err := b.Usage(t.Context()); err != nil || du.TotalCount != 0 {
		t.Errorf("usage: %+v, %v", du, err)
	}
	if rep, err := b.Prune(t.Context(), ""); err != nil || rep.SpaceReclaimed != 0 {
		t.Errorf("prune: %+v, %v", rep, err)
	}
	// What a torn write left is not an error.
	if err := os.WriteFile(filepath.Join(b.cfg.Settings.Root, "usage.json"), []byte(`{"Total`), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Usage(t.Context()); err != nil {
		t.Errorf("torn usage: %v", err)
	}
}

// answering is an engine that answers one thing.
type answering struct {
	contract.Engine
	got contract.AliasRequest
	err error
}

func (a *answering) Alias(_ context.Context, r contract.AliasRequest) error { a.got = r; return a.err }

func (a *answering) Attach(context.Context, contract.AttachRequest) (contract.AttachResponse, error) {
	return contract.AttachResponse{Nameservers: []string{"10.0.0.1"}}, nil
}

func TestContract(t *testing.T) {
	e := &answering{}
	srv := grpc.NewServer()
	contract.Register(srv, e)
	sock := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", sock)
	if err != nil {
		t.Fatal(err)
	}
	go func() { _ = srv.Serve(l) }()
	defer srv.Stop()
	cc, err := grpc.NewClient("unix:"+sock, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer cc.Close()
	c := contract.Client{Conn: cc}
	want := contract.AliasRequest{From: "a", To: "b\x00\"", Parent: "ü"}
	if err := c.Alias(t.Context(), want); err != nil || e.got != want {
		t.Errorf("got %+v, %v", e.got, err)
	}
	e.err = errdefs.ErrNotFound
	if err := c.Alias(t.Context(), want); !errdefs.IsNotFound(err) {
		t.Errorf("an error's kind was lost: %v", err)
	}
	e.err = fault.New(fault.Invalid, "no such thing")
	if err := c.Alias(t.Context(), want); err == nil || !strings.Contains(err.Error(), "no such thing") {
		t.Errorf("an error's text was lost: %v", err)
	}
	if r, err := c.Attach(t.Context(), contract.AttachRequest{}); err != nil || len(r.Nameservers) != 1 {
		t.Errorf("attach: %+v, %v", r, err)
	}
}
