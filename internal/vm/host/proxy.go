package host

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net"
	"net/http"
	"net/http/httputil"
	"net/netip"
	"net/url"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/network"

	"github.com/cloudos-io/cloudos/api"
	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/vmwire"
)

// maxRunBody bounds a request that is read whole before it is passed on.
const maxRunBody = 16 << 20

var (
	startPath  = regexp.MustCompile(`^(?:/v[0-9.]+)?/containers/([^/]+)/(start|restart)$`)
	createPath = regexp.MustCompile(`^(?:/v[0-9.]+)?/containers/create$`)
	rawPath    = regexp.MustCompile(`^(?:/v[0-9.]+)?/(?:containers/[^/]+/attach|exec/[^/]+/start)$`)
)

// proxy serves the engine's API: it wakes the machine, passes requests on, and
// minds what a start publishes and what a container mounts.
func (h *Host) proxy() http.Handler {
	forward := &httputil.ReverseProxy{
		Rewrite: func(r *httputil.ProxyRequest) {
			r.Out.URL.Scheme, r.Out.URL.Host = "http", "machine"
			r.Out.Host = r.In.Host
		},
		Transport:     guestTransport{h},
		FlushInterval: -1,
		ErrorLog:      log.New(io.Discard, "", 0),
		ErrorHandler: func(w http.ResponseWriter, r *http.Request, err error) {
			if r.Context().Err() == nil {
				answerError(w, err)
			}
		},
		ModifyResponse: nil,
	}
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		l, err := h.awake(r.Context())
		if err != nil {
			answerError(w, err)
			return
		}
		defer h.used()
		path := r.URL.Path
		switch {
		case r.Method == http.MethodPost && path == api.Root+"/run":
			h.raw(w, r, l)
		case rawPath.MatchString(path) || r.Header.Get("Upgrade") != "":
			h.raw(w, r, l)
		case r.Method == http.MethodPost && startPath.MatchString(path):
			release, err := h.beforeStart(r.Context(), l, startPath.FindStringSubmatch(path)[1])
			if err != nil {
				answerError(w, err)
				return
			}
			aw := &afterward{ResponseWriter: w, before: func(status int) {
				if status >= 300 {
					release()
					return
				}
				// What was published by chance is there when the answer is, too.
				if err := h.look(context.WithoutCancel(r.Context()), l); err != nil {
					h.log.Warn("cannot list the machine's containers", "error", err)
				}
			}}
			forward.ServeHTTP(aw, r)
		case r.Method == http.MethodPost && createPath.MatchString(path):
			body, err := readBody(r)
			if err == nil {
				body, err = l.placeMounts(body)
			}
			if err == nil {
				err = h.checkMounts(l, body)
			}
			if err != nil {
				answerError(w, err)
				return
			}
			r.Body, r.ContentLength = io.NopCloser(bytes.NewReader(body)), int64(len(body))
			forward.ServeHTTP(w, r)
		default:
			r.Body = counted{r.Body, h}
			forward.ServeHTTP(w, r)
		}
	})
}

// afterward does something between the guest's answer and ours.
type afterward struct {
	http.ResponseWriter
	before func(status int)
	done   bool
}

func (a *afterward) WriteHeader(status int) {
	if !a.done && status >= 200 {
		a.done = true
		a.before(status)
	}
	a.ResponseWriter.WriteHeader(status)
}

// counted notes that a body is being sent: a long upload is use.
type counted struct {
	io.ReadCloser
	h *Host
}

func (c counted) Read(p []byte) (int, error) {
	c.h.used()
	return c.ReadCloser.Read(p)
}

// guestTransport asks the engine of whatever machine runs, and notes what it says as use.
type guestTransport struct{ h *Host }

func (t guestTransport) RoundTrip(r *http.Request) (*http.Response, error) {
	_, l := t.h.now()
	if l == nil {
		return nil, errAsleep
	}
	_, engine, _ := l.conversation()
	if engine == nil {
		return nil, errAsleep
	}
	resp, err := engine.Transport.RoundTrip(r)
	if err != nil {
		return nil, fault.New(fault.Unavailable, "cannot ask the engine in the machine: %w", err)
	}
	resp.Body = counted{resp.Body, t.h}
	return resp, nil
}

// answerError answers as the engine does.
func answerError(w http.ResponseWriter, err error) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(fault.Of(err).Status())
	json.NewEncoder(w).Encode(map[string]string{"message": err.Error()})
}

// readBody reads a request's body whole.
func readBody(r *http.Request) ([]byte, error) {
	b, err := io.ReadAll(io.LimitReader(r.Body, maxRunBody+1))
	if err == nil && len(b) > maxRunBody {
		err = fault.New(fault.Invalid, "the request is longer than %d bytes", maxRunBody)
	}
	return b, err
}

// raw passes a request on whose connection becomes a stream.
func (h *Host) raw(w http.ResponseWriter, r *http.Request, l *live) {
	body, err := readBody(r)
	if err == nil && r.URL.Path == api.Root+"/run" {
		if body, err = l.placeMounts(body); err == nil {
			err = h.checkMounts(l, body)
		}
	}
	release := func() {}
	if err == nil && r.URL.Path == api.Root+"/run" {
		var run struct{ HostConfig *container.HostConfig }
		if json.Unmarshal(body, &run) == nil && run.HostConfig != nil {
			release, err = l.ports.reserve(fixed(run.HostConfig.PortBindings))
		}
	}
	if err != nil {
		answerError(w, err)
		return
	}
	s, _, _ := l.conversation()
	if s == nil {
		release()
		answerError(w, errAsleep)
		return
	}
	stream, err := s.Open(r.Context(), vmwire.Purpose{Kind: vmwire.API})
	if err != nil {
		release()
		answerError(w, fault.As(fault.Unavailable, err))
		return
	}
	conn, buf, err := http.NewResponseController(w).Hijack()
	if err != nil {
		release()
		stream.Reset()
		return
	}
	conn.SetDeadline(time.Time{})
	client, ok := conn.(half)
	if !ok {
		release()
		conn.Close()
		stream.Reset()
		return
	}
	if _, err := stream.Write(head(r, body)); err != nil {
		release()
		conn.Close()
		stream.Reset()
		return
	}
	splice(l.ctx, &used{half: client, br: buf.Reader, h: h}, stream)
}

// used is a client's connection: what passes is use.
type used struct {
	half
	br *bufio.Reader
	h  *Host
}

func (u *used) Read(p []byte) (int, error) {
	n, err := u.br.Read(p)
	u.h.used()
	return n, err
}

func (u *used) Write(p []byte) (int, error) {
	u.h.used()
	return u.half.Write(p)
}

// head renders a request as it came, with its body whole.
func head(r *http.Request, body []byte) []byte {
	var b bytes.Buffer
	fmt.Fprintf(&b, "%s %s HTTP/1.1\r\nHost: %s\r\n", r.Method, requestURI(r.URL), r.Host)
	header := r.Header.Clone()
	header.Del("Expect")
	header.Del("Transfer-Encoding")
	header.Set("Content-Length", strconv.Itoa(len(body)))
	header.Write(&b)
	b.WriteString("\r\n")
	b.Write(body)
	return b.Bytes()
}

func requestURI(u *url.URL) string {
	s := u.EscapedPath()
	if u.RawQuery != "" {
		s += "?" + u.RawQuery
	}
	return s
}

// fixed lists the places that a container asks for by number.
func fixed(bindings network.PortMap) []place {
	var out []place
	for port, bs := range bindings {
		for _, b := range bs {
			n, err := strconv.ParseUint(b.HostPort, 10, 16)
			if err != nil || n == 0 || port.Proto() == "sctp" {
				continue // a range, or the engine's choice: published once it is known
			}
			if b.HostIP.IsValid() {
				out = append(out, place{netip.AddrPortFrom(b.HostIP.Unmap(), uint16(n)), string(port.Proto())})
				continue
			}
			out = append(out, place{netip.AddrPortFrom(netip.IPv4Unspecified(), uint16(n)), string(port.Proto())})
		}
	}
	return out
}

// beforeStart reserves what a container will publish.
func (h *Host) beforeStart(ctx context.Context, l *live, id string) (func(), error) {
	var c struct {
		HostConfig struct{ PortBindings network.PortMap }
	}
	if err := l.engine(ctx, "GET", "/containers/"+url.PathEscape(id)+"/json", nil, &c); err != nil {
		return func() {}, nil // the engine says better what is wrong
	}
	release, err := l.ports.reserve(fixed(c.HostConfig.PortBindings))
	if err != nil {
		return nil, fmt.Errorf("driver failed programming external connectivity on endpoint %s: %w", id, err)
	}
	return release, nil
}

// checkMounts refuses to mount host folders that the machine does not have: the
// guest would make an empty one of its own.
func (h *Host) checkMounts(l *live, body []byte) error {
	var c struct{ HostConfig *container.HostConfig }
	if json.Unmarshal(body, &c) != nil || c.HostConfig == nil {
		return nil // the engine says better what is wrong
	}
	var sources []string
	for _, b := range c.HostConfig.Binds {
		if src, _, ok := strings.Cut(b, ":"); ok {
			sources = append(sources, src)
		}
	}
	for _, m := range c.HostConfig.Mounts {
		if m.Type == "bind" {
			sources = append(sources, m.Source)
		}
	}
	inside := l.sharesInside()
	for _, src := range sources {
		if !strings.HasPrefix(src, "/") || guestOwn(src) {
			continue
		}
		if !isInside(inside, src) {
			if own, err := l.origin(src); err == nil {
				src = own
			}
			return fault.New(fault.Invalid, "%s is not shared with the virtual machine: share it, or a folder above it, with 'servin vm config --share %s'", src, src)
		}
	}
	return nil
}

// guestOwn are places of the guest that containers mount on purpose: its engine's
// socket, its kernel's folders.
func guestOwn(path string) bool {
	for _, p := range []string{"/var/run", "/run", "/proc", "/sys", "/dev", "/lib/modules", "/etc", "/var/lib", "/var/log"} {
		if path == p || strings.HasPrefix(path, p+"/") {
			return true
		}
	}
	return path == "/"
}

var _ net.Conn = (*used)(nil)
