package osinit

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/api/debugshell"
	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/osinit/breakglass"
	"github.com/cloudos-io/cloudos/internal/osinit/config"
	"github.com/cloudos-io/cloudos/internal/vmwire"
)

// newGate returns the gate of the shell for emergencies.
func (m *machine) newGate() *breakglass.Gate {
	return breakglass.New(breakglass.Config{
		Log: m.log.Printf, Changed: m.change,
		Wait: m.waitRemoved,
		Kill: func(ctx context.Context, id string) error {
			err := m.askEngine(ctx, http.MethodDelete, "/containers/"+id+"?force=1")
			if fault.Is(err, fault.NotFound) {
				return nil
			}
			return err
		},
		Record: func(ctx context.Context, id string) error {
			return m.askEngine(ctx, http.MethodDelete, "/servin/debug-shell/"+id)
		},
	})
}

// askEngine has the engine do something, waiting for one that is being started again.
func (m *machine) askEngine(ctx context.Context, method, path string) error {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	var last error
	for ctx.Err() == nil {
		req, err := http.NewRequestWithContext(ctx, method, "http://engine"+path, nil)
		if err != nil {
			return err
		}
		res, err := m.engineClient().Do(req)
		if err == nil {
			io.Copy(io.Discard, io.LimitReader(res.Body, 1<<20))
			res.Body.Close()
			switch {
			case res.StatusCode == http.StatusNotFound:
				return fault.New(fault.NotFound, "the engine answers %s", res.Status)
			case res.StatusCode >= 300:
				return fmt.Errorf("the engine answers %s", res.Status)
			}
			return nil
		}
		last = err
		select {
		case <-ctx.Done():
		case <-time.After(500 * time.Millisecond):
		}
	}
	return last
}

// waitRemoved returns when the engine has no such container any more.
func (m *machine) waitRemoved(ctx context.Context, id string) {
	for ctx.Err() == nil {
		req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://engine/containers/"+id+"/wait?condition=removed", nil)
		if err != nil {
			return
		}
		res, err := m.engineClient().Do(req)
		if err == nil {
			_, err = io.Copy(io.Discard, io.LimitReader(res.Body, 1<<20))
			res.Body.Close()
			// An engine that stops ends the answer early: only who does not find it is sure.
			if res.StatusCode == http.StatusNotFound {
				return
			}
		}
		wait := 200 * time.Millisecond
		if err != nil || res.StatusCode >= 300 {
			wait = time.Second
		}
		select {
		case <-ctx.Done():
		case <-time.After(wait):
		}
	}
}

// serveDebugShell opens the gate where the document says so, and answers the engine, until ctx
// is done.
func (m *machine) serveDebugShell(ctx context.Context, c config.DebugShell) {
	if c.On {
		until := c.Until
		if c.For > 0 {
			until = time.Now().Add(c.For)
		}
		reason := c.Reason
		if reason == "" {
			reason = "no reason given"
		}
		m.gate.Open(until, "the configuration", reason)
	}
	l, err := listenPrivate(debugshell.Socket)
	if err != nil {
		m.problem(fmt.Errorf("cannot serve the debug shell: %w", err))
		return
	}
	mux := http.NewServeMux()
	for pattern, handle := range map[string]func(*http.Request) (any, error){
		"GET /": func(*http.Request) (any, error) { return m.gate.Status(), nil },
		"POST /": func(r *http.Request) (any, error) {
			var in debugshell.Request
			if err := readStrict(r, &in); err != nil {
				return nil, err
			}
			return m.gate.Enable(in)
		},
		"DELETE /": func(r *http.Request) (any, error) { return m.gate.Disable(r.Context(), callerName(r)), nil },
		"POST /sessions": func(r *http.Request) (any, error) {
			var in debugshell.Session
			if err := readStrict(r, &in); err != nil {
				return nil, err
			}
			return struct{}{}, m.gate.Begin(in)
		},
		"DELETE /sessions/{id}": func(r *http.Request) (any, error) { return struct{}{}, m.gate.End(r.Context(), r.PathValue("id")) },
	} {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			answer, err := handle(r)
			status := http.StatusOK
			if err != nil {
				status, answer = fault.Of(err).Status(), vmwire.Problem{Message: err.Error()}
			}
			w.Header().Set("Content-Type", "application/json")
			w.WriteHeader(status)
			json.NewEncoder(w).Encode(answer)
		})
	}
	s := &http.Server{Handler: mux, ReadHeaderTimeout: 10 * time.Second, MaxHeaderBytes: 8 << 10, BaseContext: func(net.Listener) context.Context { return ctx }}
	stop := context.AfterFunc(ctx, func() { s.Close() })
	defer stop()
	go func() {
		if err := s.Serve(l); err != nil && ctx.Err() == nil {
			m.problem(fmt.Errorf("cannot serve the debug shell: %w", err))
		}
	}()
	m.gate.Run(ctx)
}

// callerName is who asked the engine.
func callerName(r *http.Request) string {
	by := strings.Map(func(c rune) rune {
		if c < ' ' || c > '~' {
			return -1
		}
		return c
	}, r.URL.Query().Get("by"))
	if by == "" {
		return "somebody"
	}
	return by[:min(len(by), 200)]
}

func readStrict(r *http.Request, v any) error {
	d := json.NewDecoder(http.MaxBytesReader(nil, r.Body, 64<<10))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil {
		return fault.New(fault.Invalid, "cannot read the request: %w", err)
	}
	return nil
}

// listenPrivate listens on a socket that root alone reaches, from its first moment on: it gets the mode of what is bound. (The
// umask is that of all who make files meanwhile, and of an engine that is started then.)
func listenPrivate(path string) (net.Listener, error) {
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	c := net.ListenConfig{Control: func(_, _ string, s syscall.RawConn) error {
		var err error
		return errors.Join(s.Control(func(fd uintptr) { err = unix.Fchmod(int(fd), 0o600) }), err)
	}}
	return c.Listen(context.Background(), "unix", path)
}

// debugShellLine is what the screen says of the shell, or nothing.
func (m *machine) debugShellLine() string {
	s := m.gate.Status()
	if !s.On && len(s.Sessions) == 0 {
		return ""
	}
	what := "off"
	if s.On {
		what = "ON until the machine starts again"
		if !s.Until.IsZero() {
			what = "ON until " + s.Until.UTC().Format(time.RFC3339)
		}
		what += ", by " + s.By
	}
	return fmt.Sprintf("%s, %d open", what, len(s.Sessions))
}
