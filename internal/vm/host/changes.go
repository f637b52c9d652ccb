package host

import (
	"context"
	"errors"
	"io/fs"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/fsnotify/fsnotify"

	"github.com/cloudos-io/cloudos/api"
	"github.com/cloudos-io/cloudos/internal/vm"
	"github.com/cloudos-io/cloudos/internal/vmwire"
)

const (
	maxWatched = 8192 // folders
	maxBatch   = 512  // paths told at a time
	quietTime  = 30 * time.Millisecond
)

// changes tells the guest what changes in folders that its containers mount:
// virtiofs does not, so watchers inside would sleep through an editor's save.
type changes struct {
	l   *live
	log *slog.Logger

	mu     sync.Mutex
	wanted []string
	poke   chan struct{}
}

func newChanges(l *live, log *slog.Logger) *changes {
	return &changes{l: l, log: log, poke: make(chan struct{}, 1)}
}

// want says which folders matter from now on.
func (c *changes) want(paths []string) {
	c.mu.Lock()
	same := slices.Equal(c.wanted, paths)
	c.wanted = paths
	c.mu.Unlock()
	if !same {
		select {
		case c.poke <- struct{}{}:
		default:
		}
	}
}

// inShares reports whether the guest may name the path: it is inside a share, also
// after links are followed.
func inShares(shares []api.VMShare, path string) bool {
	if !filepath.IsAbs(path) || filepath.Clean(path) != path {
		return false
	}
	if _, ok := vm.Shared(shares, path); !ok {
		return false
	}
	real, err := filepath.EvalSymlinks(path)
	if err != nil {
		return false
	}
	for _, s := range shares {
		if root, err := filepath.EvalSymlinks(s.Path); err == nil {
			if _, ok := vm.Shared([]api.VMShare{{Path: root}}, real); ok {
				return true
			}
		}
	}
	return false
}

// run watches until ctx ends.
func (c *changes) run(ctx context.Context) {
	var w *fsnotify.Watcher
	defer func() {
		if w != nil {
			w.Close()
		}
	}()
	var events chan fsnotify.Event
	var errs chan error
	pending := map[string]bool{}
	var flush <-chan time.Time
	var roots []string
	for {
		select {
		case <-ctx.Done():
			return
		case <-c.poke:
			c.mu.Lock()
			roots = slices.Clone(c.wanted)
			c.mu.Unlock()
			if w != nil {
				w.Close()
				w, events, errs = nil, nil, nil
			}
			if len(roots) == 0 {
				continue
			}
			var err error
			if w, err = fsnotify.NewWatcher(); err != nil {
				c.log.Warn("changes of files are not told to the machine", "error", err)
				continue
			}
			events, errs = w.Events, w.Errors
			left := maxWatched
			for _, r := range roots {
				left = c.add(w, r, left)
			}
		case e, ok := <-events:
			if !ok {
				events = nil
				continue
			}
			// The guest makes attributes change itself: they tell nothing.
			if e.Op&(fsnotify.Create|fsnotify.Write|fsnotify.Remove|fsnotify.Rename) == 0 {
				continue
			}
			if e.Has(fsnotify.Create) {
				if fi, err := os.Lstat(e.Name); err == nil && fi.IsDir() {
					c.add(w, e.Name, maxWatched-len(w.WatchList()))
				}
			}
			if len(pending) < maxBatch {
				pending[e.Name] = true
				if e.Op&(fsnotify.Remove|fsnotify.Rename|fsnotify.Create) != 0 {
					pending[filepath.Dir(e.Name)] = true
				}
			} else {
				pending[filepath.Dir(e.Name)] = true // that something changed there
			}
			if flush == nil {
				flush = time.After(quietTime)
			}
		case err, ok := <-errs:
			if !ok {
				errs = nil
				continue
			}
			if errors.Is(err, fsnotify.ErrEventOverflow) {
				for _, r := range roots {
					pending[r] = true
				}
				if flush == nil {
					flush = time.After(quietTime)
				}
			}
		case <-flush:
			flush = nil
			paths := make([]string, 0, len(pending))
			for p := range pending {
				if p, err := c.l.place(p); err == nil {
					paths = append(paths, p)
				}
			}
			clear(pending)
			slices.Sort(paths)
			for len(paths) > 0 {
				n := min(maxBatch, len(paths))
				tctx, cancel := context.WithTimeout(ctx, 10*time.Second)
				if err := c.l.call(tctx, "POST", "/v1/changes", vmwire.Changes{Paths: paths[:n]}, nil); err != nil && ctx.Err() == nil {
					c.log.Debug("cannot tell the machine of changes", "error", err)
				}
				cancel()
				paths = paths[n:]
			}
		}
	}
}

// add watches a folder and those below it, and tells how many more may be.
func (c *changes) add(w *fsnotify.Watcher, root string, left int) int {
	full := false
	filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.IsDir() && path != root {
			return nil
		}
		if left <= 0 {
			full = true
			return fs.SkipAll
		}
		if d.IsDir() && (d.Name() == ".git" || d.Name() == "node_modules") && path != root {
			return fs.SkipDir // nobody edits there, and they are most of a tree
		}
		if w.Add(path) == nil {
			left--
		}
		return nil
	})
	if full {
		c.log.Warn("too many folders to watch: changes deep in them are not told to the machine", "folder", root, "most", maxWatched)
	}
	return left
}
