// Package filesync brings changes of files on this machine into running
// containers: it watches folders, groups what happens within a moment, decides by
// rules what a change means, and copies files as one archive. `servin watch` and
// `servin compose watch` are built on it.
//
// Vocabulary: a rule maps a path of the host to one in the container, with
// patterns of what counts; a batch is what changed within one moment.
package filesync

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

	"github.com/fsnotify/fsnotify"
	"github.com/moby/patternmatcher"
)

// quiet is how long nothing must happen for a batch to be whole, full how long
// one may grow.
const (
	quiet = 100 * time.Millisecond
	full  = 2 * time.Second
)

// maxWatches bounds the folders that are watched: each takes kernel memory.
const maxWatches = 100_000

// Rule says which changes count and where they go.
type Rule struct {
	// Path is a folder or file of the host, absolute.
	Path string
	// Target is where it is in the container; "" for rules that copy nothing.
	Target string
	// Include, if there is any, has the patterns that a path below Path must
	// match; Ignore those that it must not. They are .dockerignore's.
	Include, Ignore []string
	// Excluded, if set, leaves out more paths of the host.
	Excluded func(path string) bool

	include, ignore *patternmatcher.PatternMatcher
}

// ephemeral are files that editors and tools leave for a moment.
var ephemeral = []string{"**/.git", "**/*.swp", "**/*.swx", "**/*.swpx", "**/*~", "**/.#*", "**/#*#", "**/4913", "**/.DS_Store", "**/*___jb_tmp___", "**/*___jb_old___", "**/.idea"}

// Compile makes a rule ready.
func (r *Rule) Compile() error {
	if !filepath.IsAbs(r.Path) {
		return fmt.Errorf("cannot watch %s: the path is not absolute", r.Path)
	}
	r.Path = filepath.Clean(r.Path)
	// A folder may be reached through a link; events come with its true name.
	if p, err := filepath.EvalSymlinks(r.Path); err == nil {
		r.Path = p
	}
	var err error
	if len(r.Include) > 0 {
		if r.include, err = patternmatcher.New(r.Include); err != nil {
			return fmt.Errorf("cannot use the pattern: %w", err)
		}
	}
	if r.ignore, err = patternmatcher.New(append(slices.Clone(ephemeral), r.Ignore...)); err != nil {
		return fmt.Errorf("cannot use the pattern: %w", err)
	}
	return nil
}

// Match tells whether a path of the host counts, and its place in the container.
func (r *Rule) Match(path string) (Change, bool) {
	rel, err := filepath.Rel(r.Path, path)
	if err != nil || rel == ".." || strings.HasPrefix(rel, ".."+string(filepath.Separator)) {
		return Change{}, false
	}
	if r.Excluded != nil && r.Excluded(path) {
		return Change{}, false
	}
	rel = filepath.ToSlash(rel)
	if rel != "." {
		if r.include != nil {
			if ok, err := r.include.MatchesOrParentMatches(rel); err != nil || !ok {
				return Change{}, false
			}
		}
		if skip, err := r.ignore.MatchesOrParentMatches(rel); err != nil || skip {
			return Change{}, false
		}
	}
	c := Change{Host: path}
	if r.Target != "" {
		c.Container = strings.TrimSuffix(r.Target, "/")
		if rel != "." {
			c.Container += "/" + rel
		}
		if c.Container == "" {
			c.Container = "/"
		}
	}
	return c, true
}

// skips tells whether nothing below a folder can count.
func (r *Rule) skips(dir string) bool {
	rel, err := filepath.Rel(r.Path, dir)
	if err != nil || rel == "." || strings.HasPrefix(rel, "..") || r.ignore.Exclusions() {
		return false
	}
	skip, err := r.ignore.MatchesOrParentMatches(filepath.ToSlash(rel))
	return err == nil && skip
}

// Change is a file of the host that changed, and its place in the container.
type Change struct{ Host, Container string }

// Watch calls fn for each batch of paths that changed below the rules' paths,
// until the context ends. The next batch waits for fn. ready is called once
// everything is watched.
func Watch(ctx context.Context, rules []*Rule, ready func(), fn func(ctx context.Context, paths []string) error) error {
	n, err := fsnotify.NewBufferedWatcher(4096)
	if err != nil {
		return fmt.Errorf("cannot watch files: %w", err)
	}
	defer n.Close()
	w := &watcher{n: n, rules: rules}
	for _, r := range rules {
		if err := w.add(r.Path); err != nil {
			return err
		}
	}
	if ready != nil {
		ready()
	}
	return w.run(ctx, fn)
}

type watcher struct {
	n     *fsnotify.Watcher
	rules []*Rule
	count int
}

// add watches a folder and those below, or the folder of a file: editors replace
// files, and a watch of the file itself would stay with the old one.
func (w *watcher) add(root string) error {
	fi, err := os.Lstat(root)
	if errors.Is(err, fs.ErrNotExist) {
		parent := filepath.Dir(root)
		if parent == root {
			return fmt.Errorf("cannot watch %s: it does not exist", root)
		}
		if _, err := os.Lstat(parent); err != nil {
			return fmt.Errorf("cannot watch %s: neither it nor its folder exists", root)
		}
		return w.one(parent)
	}
	if err != nil {
		return fmt.Errorf("cannot watch: %w", err)
	}
	if !fi.IsDir() {
		return w.one(filepath.Dir(root))
	}
	return filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
		if errors.Is(err, fs.ErrNotExist) || errors.Is(err, fs.ErrPermission) {
			return nil
		}
		if err != nil {
			return err
		}
		if !d.IsDir() {
			return nil
		}
		if p != root && w.skipped(p) {
			return fs.SkipDir
		}
		return w.one(p)
	})
}

// skipped tells whether no rule can want anything below a folder.
func (w *watcher) skipped(dir string) bool {
	return !slices.ContainsFunc(w.rules, func(r *Rule) bool {
		within := dir == r.Path || strings.HasPrefix(dir, r.Path+string(filepath.Separator)) || strings.HasPrefix(r.Path, dir+string(filepath.Separator))
		return within && !r.skips(dir)
	})
}

func (w *watcher) one(dir string) error {
	if w.count++; w.count > maxWatches {
		return fmt.Errorf("cannot watch more than %d folders: ignore some", maxWatches)
	}
	err := w.n.Add(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("cannot watch %s: %w (raise fs.inotify.max_user_watches, or ignore folders that do not matter)", dir, err)
	}
	return nil
}

func (w *watcher) run(ctx context.Context, fn func(ctx context.Context, paths []string) error) error {
	batch := map[string]bool{}
	var since time.Time
	timer := time.NewTimer(time.Hour)
	timer.Stop()
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case err, ok := <-w.n.Errors:
			if !ok {
				return errors.New("cannot watch files any more: the watch ended")
			}
			if !errors.Is(err, fsnotify.ErrEventOverflow) {
				return fmt.Errorf("cannot watch files: %w", err)
			}
			// Too much at once: everything may have changed.
			for _, r := range w.rules {
				w.everything(r.Path, batch)
			}
		case ev, ok := <-w.n.Events:
			if !ok {
				return errors.New("cannot watch files any more: the watch ended")
			}
			if ev.Op == fsnotify.Chmod && !w.exists(ev.Name) {
				continue
			}
			w.take(ev, batch)
		case <-timer.C:
			paths := slices.Sorted(maps.Keys(batch))
			clear(batch)
			since = time.Time{}
			if err := fn(ctx, paths); err != nil {
				return err
			}
			continue
		}
		if len(batch) == 0 {
			continue
		}
		if since.IsZero() {
			since = time.Now()
		}
		timer.Reset(min(quiet, max(0, full-time.Since(since))))
	}
}

func (w *watcher) exists(p string) bool {
	_, err := os.Lstat(p)
	return err == nil
}

// take notes an event; a folder that is new is watched, and what it holds already
// has changed, too.
func (w *watcher) take(ev fsnotify.Event, batch map[string]bool) {
	batch[ev.Name] = true
	if !ev.Has(fsnotify.Create) {
		return
	}
	if fi, err := os.Lstat(ev.Name); err != nil || !fi.IsDir() || w.skipped(ev.Name) {
		return
	}
	if w.add(ev.Name) == nil {
		w.everything(ev.Name, batch)
	}
}

func (w *watcher) everything(root string, batch map[string]bool) {
	filepath.WalkDir(root, func(p string, d fs.DirEntry, err error) error {
		if err != nil {
			return nil
		}
		if d.IsDir() && p != root && w.skipped(p) {
			return fs.SkipDir
		}
		batch[p] = true
		return nil
	})
}
