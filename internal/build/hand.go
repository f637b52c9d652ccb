package build

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
	"syscall"
	"time"

	"go.opentelemetry.io/otel"
	"go.opentelemetry.io/otel/propagation"
	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/build/contract"
)

// wholeRequest writes down a request that asks for another protocol, for a client's
// connection to be given to the builder with it: thousands of small messages go over
// such a connection, and each would wake this process twice. It is nil where the
// connection must be copied instead: one of TLS, or a request with a body, or one
// that is answered, so that the next on its connection is the engine's again.
func wholeRequest(r *http.Request) ([]byte, error) {
	addr, _ := r.Context().Value(http.LocalAddrContextKey).(net.Addr)
	if !contract.Upgrades(r.URL.Path) || r.Header.Get("Upgrade") == "" || addr == nil || addr.Network() != "unix" || r.TLS != nil ||
		r.ContentLength != 0 || len(r.TransferEncoding) > 0 {
		return nil, nil
	}
	out := &http.Request{
		Method: r.Method, URL: &url.URL{Scheme: "http", Host: "buildd", Path: r.URL.Path, RawQuery: r.URL.RawQuery},
		Header: r.Header.Clone(), Host: "buildd", ProtoMajor: 1, ProtoMinor: 1,
	}
	otel.GetTextMapPropagator().Inject(r.Context(), propagation.HeaderCarrier(out.Header))
	var b bytes.Buffer
	if err := out.Write(&b); err != nil {
		return nil, fmt.Errorf("cannot write the request down: %w", err)
	}
	if b.Len() > contract.MaxHanded/2 {
		return nil, nil
	}
	return b.Bytes(), nil
}

// hand gives a client's connection to the builder, with the request that was read
// from it, and returns when the builder has done with it or the request's context ends.
func (b *Builder) hand(w http.ResponseWriter, r *http.Request, to *net.UnixConn, request []byte) {
	ends, theirs, err := os.Pipe()
	if err != nil {
		b.failed(w, r, fmt.Errorf("cannot hand a connection over: %w", err))
		return
	}
	defer ends.Close()
	defer theirs.Close()
	conn, buf, err := http.NewResponseController(w).Hijack()
	if err != nil {
		b.failed(w, r, fmt.Errorf("cannot hand a connection over: %w", err))
		return
	}
	defer conn.Close()
	early, _ := buf.Reader.Peek(buf.Reader.Buffered())
	if err := send(to, append(request, early...), conn, theirs); err != nil {
		b.log.Error("cannot hand a connection to the builder", "path", r.URL.Path, "cause", err)
		const why = `{"message":"cannot build: the builder has just ended; try again"}`
		_, _ = fmt.Fprintf(conn, "HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\nContent-Length: %d\r\nConnection: close\r\n\r\n%s", len(why), why)
		return
	}
	_ = theirs.Close()
	_ = conn.Close()
	// An engine that stops does not wait for a build to end by itself.
	defer context.AfterFunc(r.Context(), func() { _ = ends.SetReadDeadline(time.Unix(1, 0)) })()
	_, _ = io.Copy(io.Discard, ends) // nobody writes: it ends with the builder's end
}

func send(to *net.UnixConn, message []byte, conn net.Conn, end *os.File) error {
	c, ok := conn.(syscall.Conn)
	if !ok {
		return errors.New("the connection has no descriptor")
	}
	return withDescriptor(c, func(fd int) error {
		return withDescriptor(end, func(end int) error {
			_, _, err := to.WriteMsgUnix(message, unix.UnixRights(fd, end), nil)
			return err
		})
	})
}

// withDescriptor lends c's descriptor to f.
func withDescriptor(c syscall.Conn, f func(fd int) error) error {
	rc, err := c.SyscallConn()
	if err != nil {
		return err
	}
	var ferr error
	if err := rc.Control(func(fd uintptr) { ferr = f(int(fd)) }); err != nil {
		return err
	}
	return ferr
}

// handPair makes the sockets over which connections are handed over.
func handPair() (ours *net.UnixConn, theirs *os.File, err error) {
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("cannot make a socket for the builder: %w", err)
	}
	f := os.NewFile(uintptr(fds[0]), "hand")
	defer f.Close()
	theirs = os.NewFile(uintptr(fds[1]), "handed")
	c, err := net.FileConn(f)
	if err != nil {
		_ = theirs.Close()
		return nil, nil, fmt.Errorf("cannot make a socket for the builder: %w", err)
	}
	return c.(*net.UnixConn), theirs, nil
}
