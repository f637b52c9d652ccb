package remote

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/logs"
	"github.com/cloudos-io/cloudos/internal/logs/driver"
)

// Config of a Shipper.
type Config struct {
	// Dir holds a directory for each container with a remote driver: its log, the
	// cursor and what is said about it.
	Dir string
	// Watcher may be shared with readers of logs; nil makes one.
	Watcher *logs.Watcher
	// Keep is how long records of removed containers are kept for a remote that
	// is away, an hour by default.
	Keep time.Duration
	// JournalSocket is JournalSocket by default.
	JournalSocket string
	Logger        *slog.Logger
}

// Shipper sends what containers with remote drivers write.
type Shipper struct {
	cfg  Config
	log  *slog.Logger
	host string

	mu      sync.Mutex
	flows   map[string]*flow
	ctx     context.Context // of Run; nil before
	tasks   sync.WaitGroup
	stopped bool

	sent, lost, failures atomic.Uint64
}

// flow is one container's way to its remote.
type flow struct {
	id  string
	dir string

	mu      sync.Mutex
	ended   chan struct{} // closed when the container's process has ended
	live    bool
	retired time.Time     // since when the container is gone; zero while it is not
	gone    chan struct{} // closed when it is
	running bool
	trouble string // why nothing can be sent at present
	since   time.Time
}

// New makes a shipper; Run sends.
func New(c Config) (*Shipper, error) {
	if c.Logger == nil {
		c.Logger = slog.New(slog.DiscardHandler)
	}
	if c.Watcher == nil {
		c.Watcher = logs.NewWatcher()
	}
	if c.Keep <= 0 {
		c.Keep = time.Hour
	}
	if c.JournalSocket == "" {
		c.JournalSocket = JournalSocket
	}
	if err := os.MkdirAll(c.Dir, 0o700); err != nil {
		return nil, fmt.Errorf("cannot make the directory of remote logs: %w", err)
	}
	host, err := os.Hostname()
	if err != nil || host == "" {
		host = "-"
	}
	return &Shipper{cfg: c, log: c.Logger, host: host, flows: map[string]*flow{}}, nil
}

// Path is where the monitor of a container writes its log.
func (s *Shipper) Path(id string) string { return filepath.Join(s.cfg.Dir, id, "log") }

// Prepare makes a container's directory before its start; cheap.
func (s *Shipper) Prepare(src Source) error {
	if src.Driver == driver.Journald {
		if _, err := os.Stat(s.cfg.JournalSocket); err != nil {
			return fault.New(fault.Invalid, "failed to initialize logging driver: journald is not enabled on this host (%w)", err)
		}
	}
	dir := filepath.Join(s.cfg.Dir, src.ID)
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return fmt.Errorf("cannot make the directory of a remote log: %w", err)
	}
	return writeSource(dir, src)
}

// Started begins to send what a container writes; its directory is prepared.
func (s *Shipper) Started(id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f := s.flow(id)
	f.mu.Lock()
	if !f.live {
		f.live, f.ended = true, make(chan struct{})
	}
	f.mu.Unlock()
	s.run(f)
}

// Ended tells that the container's output is complete.
func (s *Shipper) Ended(id string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if f := s.flows[id]; f != nil {
		f.end()
	}
}

func (f *flow) isLive() bool {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.live
}

func (f *flow) end() {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.live {
		f.live = false
		close(f.ended)
	}
}

// Retire tells that the container is removed: its log goes when all of it is
// sent, or after a time.
func (s *Shipper) Retire(id string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.retire(id)
}

func (s *Shipper) retire(id string) error {
	dir := filepath.Join(s.cfg.Dir, id)
	m, err := os.OpenFile(filepath.Join(dir, "retired"), os.O_WRONLY|os.O_CREATE|unix.O_CLOEXEC, 0o600)
	if errors.Is(err, os.ErrNotExist) {
		return nil // there is nothing of it
	}
	if err != nil {
		return fmt.Errorf("cannot retire a remote log: %w", err)
	}
	m.Close()
	f := s.flow(id)
	f.end()
	f.mu.Lock()
	if f.retired.IsZero() {
		f.retired = time.Now()
		close(f.gone)
	}
	f.mu.Unlock()
	s.run(f)
	return nil
}

// flow returns a container's flow; s.mu is held.
func (s *Shipper) flow(id string) *flow {
	f := s.flows[id]
	if f == nil {
		ended := make(chan struct{})
		close(ended)
		f = &flow{id: id, dir: filepath.Join(s.cfg.Dir, id), ended: ended, gone: make(chan struct{})}
		s.flows[id] = f
	}
	return f
}

// run starts the flow's goroutine unless it runs; s.mu is held.
func (s *Shipper) run(f *flow) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if s.ctx == nil || s.stopped || f.running {
		return
	}
	f.running = true
	s.tasks.Go(func() { s.carry(s.ctx, f) })
}

// Retain retires the logs of containers that are not known any more: their
// removal was cut short. It is called before Run or while it runs.
func (s *Shipper) Retain(known func(id string) bool) error {
	list, err := os.ReadDir(s.cfg.Dir)
	if err != nil {
		return fmt.Errorf("cannot list remote logs: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, d := range list {
		if !known(d.Name()) {
			if err := s.retire(d.Name()); err != nil {
				s.log.Warn(err.Error())
			}
		}
	}
	return nil
}

// Run sends until ctx ends. What former engines left unsent is sent first.
func (s *Shipper) Run(ctx context.Context) error {
	list, err := os.ReadDir(s.cfg.Dir)
	if err != nil {
		return fmt.Errorf("cannot list remote logs: %w", err)
	}
	s.mu.Lock()
	s.ctx = ctx
	for _, d := range list {
		f := s.flow(d.Name())
		if fi, err := os.Stat(filepath.Join(f.dir, "retired")); err == nil {
			f.mu.Lock()
			if f.retired.IsZero() {
				f.retired = fi.ModTime()
				close(f.gone)
			}
			f.mu.Unlock()
		} else if s.backlog(f) == 0 {
			if !f.isLive() {
				delete(s.flows, f.id)
			}
			continue
		}
		s.run(f)
	}
	for _, f := range s.flows {
		s.run(f)
	}
	s.mu.Unlock()
	<-ctx.Done()
	s.mu.Lock()
	s.stopped = true
	s.mu.Unlock()
	s.tasks.Wait()
	return nil
}

// carry sends until the container's output is complete and sent.
func (s *Shipper) carry(ctx context.Context, f *flow) {
	for {
		err := s.deliver(ctx, f)
		if ctx.Err() != nil {
			err = nil
		}
		if err != nil {
			s.log.Warn("cannot send a container's log", "container", f.id, "cause", err)
			s.failures.Add(1)
		}
		s.mu.Lock()
		f.mu.Lock()
		again := f.live && ctx.Err() == nil // it runs, or was started again meanwhile
		retired := !f.retired.IsZero()
		if !again {
			f.running = false
			delete(s.flows, f.id)
		}
		f.mu.Unlock()
		s.mu.Unlock()
		if !again {
			if retired && ctx.Err() == nil {
				if err := os.RemoveAll(f.dir); err != nil {
					s.log.Warn("cannot remove a log that was sent", "container", f.id, "cause", err)
				}
			}
			return
		}
		if err != nil {
			select {
			case <-time.After(lastWait):
			case <-ctx.Done():
			}
		}
	}
}

var errKeptEnough = errors.New("its container is gone and its remote was away for too long")

// deliver is one run of a flow: one sink, from the cursor on.
func (s *Shipper) deliver(ctx context.Context, f *flow) error {
	src, err := readSource(f.dir)
	if err != nil {
		return err
	}
	if err := syncSource(f.dir); err != nil {
		return err
	}
	out, err := s.sink(src)
	if err != nil {
		return err
	}
	defer out.close()
	place, err := openPlace(f.dir)
	if err != nil {
		return err
	}
	defer place.close()
	l, err := logs.Open(filepath.Join(f.dir, "log"), driver.JSONFile, s.cfg.Watcher)
	if err != nil {
		return err
	}
	tail, err := l.From(place.cursor, func(after time.Time) {
		s.lost.Add(1)
		s.log.Error("log records were rotated away before they could be sent", "container", f.id, "driver", src.Driver, "after", after)
	})
	if err != nil {
		return err
	}
	defer tail.Close()
	parts := partials{id: src.ID}
	for final := false; ; {
		recs, err := tail.Next(512)
		if err != nil {
			return err
		}
		if len(recs) == 0 {
			if err := place.save(tail.Cursor(), true); err != nil {
				s.log.Warn("cannot store the place in a log", "container", f.id, "cause", err)
			}
			if final {
				return nil
			}
			f.mu.Lock()
			ended := f.ended
			f.mu.Unlock()
			// Once more around when it has ended, then the log is complete.
			if !tail.Wait(ctx, ended) {
				if ctx.Err() != nil {
					return nil
				}
				final = true
			}
			continue
		}
		if err := s.push(ctx, f, src, out, parts.entries(recs)); err != nil {
			if ctx.Err() != nil {
				return nil
			}
			return err
		}
		if err := place.save(tail.Cursor(), false); err != nil {
			s.log.Warn("cannot store the place in a log", "container", f.id, "cause", err)
		}
	}
}

// Waits between attempts.
const (
	firstWait = 100 * time.Millisecond
	lastWait  = 5 * time.Second
)

// push sends a batch, however often it takes.
func (s *Shipper) push(ctx context.Context, f *flow, src Source, out sink, batch []Entry) error {
	wait := firstWait
	for {
		n, err := out.send(ctx, batch)
		s.sent.Add(uint64(n))
		batch = batch[n:]
		if err == nil {
			if was, since := f.note(""); was != "" {
				s.log.Info("a container's log is sent again", "container", f.id, "driver", src.Driver, "away", time.Since(since).Round(time.Millisecond).String())
			}
			return nil
		}
		if ctx.Err() != nil {
			return ctx.Err()
		}
		s.failures.Add(1)
		if was, _ := f.note(err.Error()); was == "" {
			s.log.Warn("cannot send a container's log; it is kept and tried again", "container", f.id, "driver", src.Driver, "cause", err)
		}
		if n > 0 {
			wait = firstWait
		}
		f.mu.Lock()
		gone, retired := f.gone, f.retired
		f.mu.Unlock()
		if !retired.IsZero() {
			if time.Since(retired) > s.cfg.Keep {
				s.lost.Add(1)
				return errKeptEnough
			}
			gone = nil
		}
		select {
		case <-time.After(wait):
		case <-gone: // the time that it is kept for begins
		case <-ctx.Done():
			return ctx.Err()
		}
		wait = min(wait*2, lastWait)
	}
}

// note records why nothing can be sent; "" is that it can.
func (f *flow) note(trouble string) (was string, since time.Time) {
	f.mu.Lock()
	defer f.mu.Unlock()
	was, since = f.trouble, f.since
	if f.trouble == "" && trouble != "" {
		f.since = time.Now()
	}
	f.trouble = trouble
	return was, since
}

func (s *Shipper) sink(src Source) (sink, error) {
	switch src.Driver {
	case driver.Journald:
		return newJournal(src, s.cfg.JournalSocket), nil
	case driver.Syslog:
		return newSyslog(src, s.host)
	case driver.Fluentd:
		return newFluentd(src)
	}
	return nil, fmt.Errorf("cannot send logs of the driver %q", src.Driver)
}

// Status is how sending goes.
type Status struct {
	// Sent counts records, Failures attempts, Lost the gaps in what was sent.
	Sent, Failures, Lost uint64
	// Backlog is what waits to be sent, bytes by container.
	Backlog map[string]int64
	// Trouble says of containers why nothing can be sent.
	Trouble map[string]string
}

// Status looks at every flow.
func (s *Shipper) Status() Status {
	st := Status{Sent: s.sent.Load(), Failures: s.failures.Load(), Lost: s.lost.Load(), Backlog: map[string]int64{}, Trouble: map[string]string{}}
	s.mu.Lock()
	flows := make([]*flow, 0, len(s.flows))
	for _, f := range s.flows {
		flows = append(flows, f)
	}
	s.mu.Unlock()
	for _, f := range flows {
		f.mu.Lock()
		if f.trouble != "" {
			st.Trouble[f.id] = fmt.Sprintf("%s (since %s)", f.trouble, f.since.UTC().Format(time.RFC3339))
		}
		f.mu.Unlock()
		st.Backlog[f.id] = s.backlog(f)
	}
	return st
}

func (s *Shipper) backlog(f *flow) int64 {
	c, _ := readCursor(f.dir) // none is the beginning
	l, err := logs.Open(filepath.Join(f.dir, "log"), driver.JSONFile, s.cfg.Watcher)
	if err != nil {
		return 0
	}
	return l.Behind(c)
}
