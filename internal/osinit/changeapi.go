package osinit

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"time"

	"github.com/cloudos-io/cloudos/api/system"
	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/osinit/guest"
)

// listenChanges opens the socket that the engine passes /servin/os/ on to. Nobody but
// root reaches it. The engine looks for it when it starts.
func listenChanges() (net.Listener, error) { return listenPrivate(system.Socket) }

// handler is the API of the system.
func (c *changes) handler() http.Handler {
	mux := http.NewServeMux()
	for pattern, handle := range map[string]func(http.ResponseWriter, *http.Request) (any, error){
		"GET /servin/os/status":    func(http.ResponseWriter, *http.Request) (any, error) { return c.status(), nil },
		"POST /servin/os/upgrade":  c.upgradeAPI,
		"POST /servin/os/rollback": c.rollbackAPI,
		"POST /servin/os/reboot":   c.rebootAPI,
		"GET /servin/os/config":    c.configAPI,
		"PUT /servin/os/config":    c.setConfigAPI,
		"POST /servin/os/recovery": c.recoveryAPI,
		"GET /servin/os/log":       c.logAPI,
	} {
		mux.HandleFunc(pattern, func(w http.ResponseWriter, r *http.Request) {
			answer, err := handle(w, r)
			switch {
			case err != nil:
				guest.Fail(w, err)
			case answer != nil:
				guest.Answer(w, http.StatusOK, answer)
			}
		})
	}
	return mux
}

// serve answers until ctx is done.
func (c *changes) serve(ctx context.Context, l net.Listener) {
	s := &http.Server{Handler: c.handler(), ReadHeaderTimeout: 30 * time.Second, MaxHeaderBytes: 16 << 10, BaseContext: func(net.Listener) context.Context { return ctx }}
	stop := context.AfterFunc(ctx, func() { s.Close() })
	defer stop()
	if err := s.Serve(l); err != nil && ctx.Err() == nil {
		c.m.problem(fmt.Errorf("cannot serve the system's API: %w", err))
	}
}

func flag(r *http.Request, name string) bool {
	v := r.URL.Query().Get(name)
	return v == "1" || v == "true"
}

// upgradeAPI is POST /servin/os/upgrade: the archive is the body, or what url answers
// with. The answer begins when the body has been taken: lines of progress, and a last one.
func (c *changes) upgradeAPI(w http.ResponseWriter, r *http.Request) (any, error) {
	in, from := io.Reader(r.Body), r.URL.Query().Get("url")
	o := options{allowUnsigned: flag(r, "unsigned"), allowDowngrade: flag(r, "downgrade")}
	lines := &lines{w: w, c: http.NewResponseController(w), quiet: from == ""}
	if from != "" {
		body, err := download(r.Context(), from)
		if err != nil {
			return nil, err
		}
		defer body.Close()
		in = body
	}
	change, err := c.upgrade(r.Context(), in, o, lines.progress)
	if err != nil {
		return nil, lines.fail(err)
	}
	lines.send(system.Progress{Done: change})
	if flag(r, "reboot") {
		c.reboot()
	}
	return nil, nil
}

// lines writes an answer of lines.
type lines struct {
	w     http.ResponseWriter
	c     *http.ResponseController
	quiet bool // the request's body is still on its way
	begun bool
	last  time.Time
}

func (l *lines) progress(step, part string, n, total int64) {
	if l.quiet && step != "verify" || n < total && time.Since(l.last) < 200*time.Millisecond {
		return
	}
	l.last = time.Now()
	l.send(system.Progress{Step: step, Part: part, Bytes: n, Total: total})
}

func (l *lines) send(p system.Progress) {
	if !l.begun {
		l.begun = true
		l.w.Header().Set("Content-Type", "application/x-ndjson")
	}
	_ = json.NewEncoder(l.w).Encode(p) // who asked may have gone; the change goes on or not by its context
	_ = l.c.Flush()
}

// fail is the answer, or its last line where it has begun.
func (l *lines) fail(err error) error {
	if !l.begun {
		return err
	}
	l.send(system.Progress{Error: err.Error(), Status: fault.Of(err).Status()})
	return nil
}

func (c *changes) rollbackAPI(_ http.ResponseWriter, r *http.Request) (any, error) {
	change, err := c.rollback(r.Context(), flag(r, "force"))
	if err != nil {
		return nil, err
	}
	if flag(r, "reboot") {
		c.reboot()
	}
	return change, nil
}

func (c *changes) rebootAPI(w http.ResponseWriter, _ *http.Request) (any, error) {
	c.mu.Lock()
	busy := c.busy
	c.mu.Unlock()
	if busy != "" {
		return nil, fault.New(fault.Conflict, "cannot start the machine again: a change of the system is under way (%s)", busy)
	}
	c.reboot()
	w.WriteHeader(http.StatusAccepted)
	return nil, nil
}

// reboot starts the machine again, after the answer had time to leave.
func (c *changes) reboot() {
	time.AfterFunc(500*time.Millisecond, func() { c.m.Shutdown(true, 30*time.Second) })
}
