package cni

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/containernetworking/cni/libcni"
	"github.com/containernetworking/cni/pkg/invoke"
	"github.com/containernetworking/cni/pkg/types"
	"github.com/containernetworking/cni/pkg/version"
	"github.com/fsnotify/fsnotify"
	"golang.org/x/sync/errgroup"

	"github.com/cloudos-io/cloudos/internal/fault"
)

const (
	// settle is how long the directory must be quiet before it is read: files
	// come in several writes. One that never is gets read after settleMost.
	settle     = 100 * time.Millisecond
	settleMost = time.Second
	// verdictFor is how long a plugin's STATUS counts.
	verdictFor = 10 * time.Second
	// retryWide bounds the attachments that are undone at a time.
	retryWide = 4
	// collectAgain is when GC is tried again that had to give way to others.
	collectAgain = 30 * time.Second
)

// Run follows the configuration and undoes what could not be undone at once,
// until ctx ends.
func (s *Service) Run(ctx context.Context) error {
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return s.watch(ctx) })
	g.Go(func() error { return s.retry(ctx) })
	return g.Wait()
}

// watch reads the configuration anew when it changes. Where the directory is
// not there, the nearest one above it is watched.
func (s *Service) watch(ctx context.Context) error {
	w, err := fsnotify.NewWatcher()
	if err != nil {
		return fmt.Errorf("cannot watch %s: %w", s.cfg.ConfDir, err)
	}
	defer w.Close()
	var (
		quiet <-chan time.Time
		since time.Time // the first event that was not acted on
	)
	stirred := func() {
		if quiet == nil {
			since = time.Now()
		}
		quiet = time.After(min(settle, max(0, settleMost-time.Since(since))))
	}
	s.aim(w)
	s.reload()
	for {
		select {
		case <-ctx.Done():
			return nil
		case _, ok := <-w.Events:
			if !ok {
				return nil
			}
			stirred()
		case err, ok := <-w.Errors:
			if !ok {
				return nil
			}
			// Events may be lost: look again.
			s.log.Debug("the watch of the CNI configuration stumbled", "cause", err)
			stirred()
		case <-quiet:
			quiet = nil
			s.aim(w)
			s.reload()
		}
	}
}

// aim watches what matters now: the directory and the folders of networks in
// it, or what is there of the way to it.
func (s *Service) aim(w *fsnotify.Watcher) {
	want := map[string]bool{}
	dir := s.cfg.ConfDir
	for {
		st, err := os.Stat(dir)
		if err == nil && st.IsDir() {
			want[dir] = true
			break
		}
		if dir == "/" {
			break
		}
		dir = filepath.Dir(dir)
	}
	if dir == s.cfg.ConfDir {
		// The directory may be replaced as a whole, which its parent sees.
		want[filepath.Dir(dir)] = true
		es, _ := os.ReadDir(dir)
		for _, e := range es {
			if e.IsDir() && len(want) < maxConfFiles {
				want[filepath.Join(dir, e.Name())] = true
			}
		}
	}
	for _, p := range w.WatchList() {
		if !want[p] {
			_ = w.Remove(p)
		}
	}
	for p := range want {
		// Adding anew is needed too: the directory of that name may be another.
		if err := w.Add(p); err != nil && !errors.Is(err, fs.ErrNotExist) {
			s.log.Warn("a directory of CNI configuration cannot be watched", "path", p, "cause", err)
		}
	}
}

// retry undoes the attachments whose time has come.
func (s *Service) retry(ctx context.Context) error {
	for {
		wait := s.retryOnce(ctx)
		var timer <-chan time.Time
		if wait >= 0 {
			timer = time.After(wait)
		}
		select {
		case <-ctx.Done():
			return nil
		case <-s.kick:
		case <-timer:
		}
	}
}

// retryOnce tells how long it is until the next attempt, -1 if none is due.
func (s *Service) retryOnce(ctx context.Context) time.Duration {
	now := time.Now()
	next := time.Duration(-1)
	var due []*record
	s.mu.Lock()
	for _, r := range s.held {
		if r.State != removing {
			continue
		}
		if d := r.next.Sub(now); d > 0 {
			if next < 0 || d < next {
				next = d
			}
			continue
		}
		c := *r
		due = append(due, &c)
	}
	s.mu.Unlock()
	var g errgroup.Group
	g.SetLimit(retryWide)
	for _, r := range due {
		g.Go(func() error {
			unlock, err := s.lock(ctx, r.ContainerID)
			if err != nil {
				return nil
			}
			defer unlock()
			cur := s.get(key{r.ContainerID, r.IfName})
			if cur == nil || cur.State != removing || cur.next.After(now) {
				return nil // somebody was quicker
			}
			if err := s.undo(ctx, cur); err != nil && ctx.Err() == nil {
				s.log.Warn("a CNI attachment could not be undone; it will be tried again", "container", r.ContainerID, "attempt", cur.tries, "cause", err)
			}
			return nil
		})
	}
	_ = g.Wait()
	if len(due) > 0 {
		return 0
	}
	if next < 0 && !s.collectWanted(ctx) {
		return collectAgain
	}
	return next
}

// collectWanted collects the garbage of the networks that it was asked for, and
// tells whether that is done.
func (s *Service) collectWanted(ctx context.Context) bool {
	s.mu.Lock()
	names := slices.Sorted(maps.Keys(s.collect))
	s.mu.Unlock()
	done := true
	for _, name := range names {
		err := s.Collect(ctx, name)
		if fault.Is(err, fault.Unavailable) {
			done = false // plugins are at work: later
			continue
		}
		if err != nil && ctx.Err() == nil && !fault.Is(err, fault.NotFound) {
			s.log.Warn("plugins could not give up what they hold for nobody", "cause", err)
		}
		s.mu.Lock()
		delete(s.collect, name)
		s.mu.Unlock()
	}
	return done
}

// verdict is what plugins have said about their readiness.
type verdict struct {
	at  time.Time
	err error
}

// Status tells why nothing can be connected to a network ("" the default) now:
// there is no configuration, a plugin is not installed, or says itself that it is
// not ready (STATUS, spec 1.1).
func (s *Service) Status(ctx context.Context, name string) error {
	l, err := s.pick(name)
	if err != nil {
		return err
	}
	for _, p := range l.Plugins {
		if _, err := s.exec.FindInPath(p.Network.Type, s.cfg.BinDirs); err != nil {
			return fault.New(fault.Unavailable, "CNI network %s is not ready: %w", l.Name, err)
		}
	}
	if ok, _ := version.GreaterThanOrEqualTo(l.CNIVersion, "1.1.0"); !ok {
		return nil
	}
	s.statusMu.Lock()
	v, known := s.status[l.Name]
	s.statusMu.Unlock()
	if known && time.Since(v.at) < verdictFor {
		return v.err
	}
	v = verdict{at: time.Now(), err: s.ask(ctx, l)}
	if ctx.Err() == nil {
		s.statusMu.Lock()
		s.status[l.Name] = v
		s.statusMu.Unlock()
	}
	return v.err
}

func (s *Service) ask(ctx context.Context, l *list) error {
	ctx, cancel := context.WithTimeout(ctx, s.cfg.Limits.Ask)
	defer cancel()
	for _, p := range l.Plugins {
		err := s.plain(ctx, "STATUS", l, p, nil)
		var pe *pluginError
		if errors.As(err, &pe) && pe.code == types.ErrInvalidEnvironmentVariables {
			continue // a plugin of an older spec: it knows no such command
		}
		if err != nil {
			return fault.New(fault.Unavailable, "CNI network %s is not ready: plugin %s: %w", l.Name, p.Network.Type, err)
		}
	}
	return nil
}

// plain runs a command that is about no attachment.
func (s *Service) plain(ctx context.Context, command string, l *list, p *libcni.PluginConfig, more map[string]any) error {
	in := map[string]any{"name": l.Name, "cniVersion": l.CNIVersion}
	for k, v := range more {
		in[k] = v
	}
	conf, err := libcni.InjectConf(p, in)
	if err != nil {
		return err
	}
	env := (&invoke.Args{Command: command, Path: strings.Join(s.cfg.BinDirs, ":")}).AsEnv()
	_, err = s.call(ctx, s.cfg.Limits.Ask, p.Network.Type, conf.Bytes, env)
	return err
}

// Collect tells the plugins of a network (spec 1.1, unless disableGC) which
// attachments there are, so that they give up what they hold for others. It must
// only be called where no other engine uses the configuration: plugins cannot
// tell whose the others are.
func (s *Service) Collect(ctx context.Context, name string) error {
	l, err := s.pick(name)
	if err != nil {
		return err
	}
	if ok, _ := version.GreaterThanOrEqualTo(l.CNIVersion, "1.1.0"); !ok || l.DisableGC {
		return nil
	}
	// The spec forbids GC beside ADD and DEL on the network.
	gate := s.gate(l.Name)
	if !gate.TryAcquire(gateWidth) {
		return fault.New(fault.Unavailable, "cannot collect the garbage of CNI network %s now: containers are being connected", l.Name)
	}
	defer gate.Release(gateWidth)
	valid := []types.GCAttachment{}
	s.mu.Lock()
	for _, r := range s.held {
		if r.Network == l.Name {
			valid = append(valid, types.GCAttachment{ContainerID: r.ContainerID, IfName: r.IfName})
		}
	}
	s.mu.Unlock()
	var errs error
	for _, p := range l.Plugins {
		// The second name is what early readers of the spec looked for.
		more := map[string]any{"cni.dev/valid-attachments": valid, "cni.dev/attachments": valid}
		err := s.plain(ctx, "GC", l, p, more)
		var pe *pluginError
		if errors.As(err, &pe) && pe.code == types.ErrInvalidEnvironmentVariables {
			continue
		}
		if err != nil {
			errs = errors.Join(errs, fmt.Errorf("cannot collect the garbage of CNI network %s: plugin %s: %w", l.Name, p.Network.Type, err))
		}
	}
	return errs
}
