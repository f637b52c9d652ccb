package guest

import (
	"context"
	"encoding/json"
	"errors"
	"io"
	"net"
	"net/http"
	"strconv"
	"sync"
	"time"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/vmwire"
)

// Machine does what the control API asks.
type Machine interface {
	Status() vmwire.Status
	// Changed returns a channel that is closed at the next change of Status.
	Changed() <-chan struct{}
	SetClock(time.Time) (time.Duration, error)
	Memory() vmwire.Memory
	ReleaseMemory(caches bool) error
	Mounts() []vmwire.Mount
	Mount(vmwire.Mount) error
	Unmount(target string) error
	Touch(paths []string) int
	GrowData() (vmwire.Disk, error)
	TrimData() (uint64, error)
	Sync()
	Containers(ctx context.Context) (int, error)
	// Shutdown begins to stop the machine and returns.
	Shutdown(reboot bool, patience time.Duration)
	Log(ctx context.Context, w io.Writer, source string, tail int, follow bool) error
	Config() []byte
	SetConfig([]byte) error
	// RecoveryKey gives the recovery key of data that were encrypted in this boot, once.
	RecoveryKey() (vmwire.Recovery, error)
	// Unlock takes a recovery key or a passphrase of data that are closed.
	Unlock(ctx context.Context, key string) error
}

// Control serves the control API.
type Control struct {
	machine Machine
	streams func() int
	server  *http.Server
	queue   *queue
	once    sync.Once
	asked   chan struct{}
	asking  sync.Once
}

// Asked is closed once the host asked for the status: behind the clock and the shares that
// it gives a machine when they meet.
func (c *Control) Asked() <-chan struct{} { return c.asked }

// NewControl returns the API of a machine. streams counts the streams besides the API's.
func NewControl(m Machine, streams func() int) *Control {
	c := &Control{machine: m, streams: streams, asked: make(chan struct{}), queue: &queue{ch: make(chan net.Conn), done: make(chan struct{})}}
	mux := http.NewServeMux()
	for _, r := range []struct {
		pattern string
		handle  func(w http.ResponseWriter, r *http.Request) (any, error)
	}{
		{"GET /v1/status", c.status},
		{"GET /v1/events", c.events},
		{"PUT /v1/clock", c.clock},
		{"GET /v1/memory", func(http.ResponseWriter, *http.Request) (any, error) { return m.Memory(), nil }},
		{"POST /v1/memory/release", c.release},
		{"GET /v1/mounts", func(http.ResponseWriter, *http.Request) (any, error) { return m.Mounts(), nil }},
		{"POST /v1/mounts", c.mount},
		{"DELETE /v1/mounts", c.unmount},
		{"POST /v1/changes", c.changes},
		{"POST /v1/data/grow", func(http.ResponseWriter, *http.Request) (any, error) { return m.GrowData() }},
		{"POST /v1/data/trim", c.trim},
		{"GET /v1/busy", c.busy},
		{"POST /v1/sleep", c.sleep},
		{"POST /v1/wake", c.wake},
		{"POST /v1/shutdown", c.shutdown},
		{"GET /v1/log", c.log},
		{"GET /v1/config", c.config},
		{"PUT /v1/config", c.setConfig},
		{"GET /v1/encryption/recovery", c.recovery},
		{"POST /v1/encryption/unlock", c.unlock},
	} {
		mux.HandleFunc(r.pattern, func(w http.ResponseWriter, req *http.Request) {
			answer, err := r.handle(w, req)
			switch {
			case err != nil:
				write(w, fault.Of(err).Status(), vmwire.Problem{Message: err.Error()})
			case answer != nil:
				write(w, http.StatusOK, answer)
			}
		})
	}
	c.server = &http.Server{Handler: mux, ReadHeaderTimeout: 30 * time.Second, MaxHeaderBytes: 16 << 10}
	return c
}

func write(w http.ResponseWriter, status int, v any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	json.NewEncoder(w).Encode(v)
}

// read decodes a body strictly; an empty one leaves v.
func read(r *http.Request, v any) error {
	d := json.NewDecoder(http.MaxBytesReader(nil, r.Body, 4<<20))
	d.DisallowUnknownFields()
	if err := d.Decode(v); err != nil && !errors.Is(err, io.EOF) {
		return fault.New(fault.Invalid, "cannot read the request: %w", err)
	}
	return nil
}

// Serve serves one connection to its end.
func (c *Control) Serve(ctx context.Context, conn net.Conn) {
	c.once.Do(func() { go c.server.Serve(c.queue) })
	done := make(chan struct{})
	var once sync.Once
	select {
	case c.queue.ch <- &tracked{Conn: conn, closed: func() { once.Do(func() { close(done) }) }}:
		select {
		case <-done:
		case <-ctx.Done():
		}
	case <-ctx.Done():
	case <-c.queue.done:
	}
}

// Close ends the server.
func (c *Control) Close() error { return c.server.Close() }

// queue hands connections to the HTTP server.
type queue struct {
	ch   chan net.Conn
	done chan struct{}
	once sync.Once
}

func (q *queue) Accept() (net.Conn, error) {
	select {
	case c := <-q.ch:
		return c, nil
	case <-q.done:
		return nil, net.ErrClosed
	}
}

func (q *queue) Close() error { q.once.Do(func() { close(q.done) }); return nil }

func (q *queue) Addr() net.Addr { return addr{} }

type addr struct{}

func (addr) Network() string { return "port" }
func (addr) String() string  { return vmwire.Port }

type tracked struct {
	net.Conn
	closed func()
}

func (t *tracked) Close() error {
	err := t.Conn.Close()
	t.closed()
	return err
}

func (c *Control) status(_ http.ResponseWriter, r *http.Request) (any, error) {
	c.asking.Do(func() { close(c.asked) })
	if wait := r.FormValue("wait"); wait != "" {
		secs, err := strconv.ParseFloat(wait, 64)
		if err != nil || secs < 0 || secs > 3600 {
			return nil, fault.New(fault.Invalid, "cannot wait %q seconds", wait)
		}
		end := time.After(time.Duration(secs * float64(time.Second)))
		for {
			changed := c.machine.Changed()
			if s := c.machine.Status(); s.State != vmwire.StateStarting {
				return s, nil
			}
			select {
			case <-changed:
			case <-end:
				return c.machine.Status(), nil
			case <-r.Context().Done():
				return nil, r.Context().Err()
			}
		}
	}
	return c.machine.Status(), nil
}

func (c *Control) events(w http.ResponseWriter, r *http.Request) (any, error) {
	w.Header().Set("Content-Type", "application/x-ndjson")
	flush := http.NewResponseController(w)
	enc := json.NewEncoder(w)
	for {
		changed := c.machine.Changed()
		if enc.Encode(c.machine.Status()) != nil || flush.Flush() != nil {
			return nil, nil
		}
		select {
		case <-changed:
		case <-r.Context().Done():
			return nil, nil
		}
	}
}

func (c *Control) set(t time.Time) (time.Duration, error) {
	if t.Year() < 2024 || t.Year() > 2200 {
		return 0, fault.New(fault.Invalid, "cannot set the clock to %s", t.Format(time.RFC3339))
	}
	return c.machine.SetClock(t)
}

func (c *Control) clock(_ http.ResponseWriter, r *http.Request) (any, error) {
	var b vmwire.Clock
	if err := read(r, &b); err != nil {
		return nil, err
	}
	moved, err := c.set(b.Time)
	return vmwire.ClockSet{Moved: moved.Seconds()}, err
}

func (c *Control) release(_ http.ResponseWriter, r *http.Request) (any, error) {
	var b vmwire.Release
	if err := read(r, &b); err != nil {
		return nil, err
	}
	if err := c.machine.ReleaseMemory(b.Caches); err != nil {
		return nil, err
	}
	return c.machine.Memory(), nil
}

func (c *Control) mount(_ http.ResponseWriter, r *http.Request) (any, error) {
	var b vmwire.Mount
	if err := read(r, &b); err != nil {
		return nil, err
	}
	if err := c.machine.Mount(b); err != nil {
		return nil, err
	}
	return c.machine.Mounts(), nil
}

func (c *Control) unmount(_ http.ResponseWriter, r *http.Request) (any, error) {
	if err := c.machine.Unmount(r.FormValue("target")); err != nil {
		return nil, err
	}
	return c.machine.Mounts(), nil
}

func (c *Control) changes(_ http.ResponseWriter, r *http.Request) (any, error) {
	var b vmwire.Changes
	if err := read(r, &b); err != nil {
		return nil, err
	}
	return vmwire.Changed{Told: c.machine.Touch(b.Paths)}, nil
}

func (c *Control) trim(http.ResponseWriter, *http.Request) (any, error) {
	n, err := c.machine.TrimData()
	return vmwire.Trimmed{Bytes: n}, err
}

func (c *Control) busy(_ http.ResponseWriter, r *http.Request) (any, error) {
	n, err := c.machine.Containers(r.Context())
	return vmwire.Busy{Containers: n, Streams: c.streams()}, err
}

func (c *Control) sleep(_ http.ResponseWriter, r *http.Request) (any, error) {
	var b vmwire.Sleep
	if err := read(r, &b); err != nil {
		return nil, err
	}
	c.machine.Sync()
	_, err := c.machine.TrimData()
	if b.Memory {
		err = errors.Join(err, c.machine.ReleaseMemory(true))
	}
	if err != nil {
		return nil, err
	}
	return c.machine.Status(), nil
}

func (c *Control) wake(_ http.ResponseWriter, r *http.Request) (any, error) {
	var b vmwire.Clock
	if err := read(r, &b); err != nil {
		return nil, err
	}
	if _, err := c.set(b.Time); err != nil {
		return nil, err
	}
	return c.machine.Status(), nil
}

func (c *Control) shutdown(w http.ResponseWriter, r *http.Request) (any, error) {
	var b vmwire.Shutdown
	if err := read(r, &b); err != nil {
		return nil, err
	}
	if b.Action != "" && b.Action != "poweroff" && b.Action != "reboot" {
		return nil, fault.New(fault.Invalid, "cannot %q: the action is poweroff or reboot", b.Action)
	}
	if b.TimeoutSeconds < 0 || b.TimeoutSeconds > 3600 {
		return nil, fault.New(fault.Invalid, "cannot wait %d seconds", b.TimeoutSeconds)
	}
	patience := time.Duration(b.TimeoutSeconds) * time.Second
	if patience == 0 {
		patience = 15 * time.Second
	}
	w.WriteHeader(http.StatusAccepted)
	http.NewResponseController(w).Flush()
	// The answer is to leave the machine before the port does.
	time.AfterFunc(100*time.Millisecond, func() { c.machine.Shutdown(b.Action == "reboot", patience) })
	return nil, nil
}

func (c *Control) log(w http.ResponseWriter, r *http.Request) (any, error) {
	return nil, ServeLog(w, r, c.machine.Log)
}

func (c *Control) config(w http.ResponseWriter, _ *http.Request) (any, error) {
	w.Header().Set("Content-Type", "application/yaml")
	w.Write(c.machine.Config())
	return nil, nil
}

func (c *Control) setConfig(w http.ResponseWriter, r *http.Request) (any, error) {
	b, err := io.ReadAll(http.MaxBytesReader(w, r.Body, 1<<20))
	if err != nil {
		return nil, fault.New(fault.Invalid, "cannot read the document: %w", err)
	}
	if err := c.machine.SetConfig(b); err != nil {
		return nil, err
	}
	w.WriteHeader(http.StatusNoContent)
	return nil, nil
}
