package logs

import (
	"os"
	"path/filepath"
	"sync"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Watcher shares one inotify instance among all followed logs: a host allows
// few instances (128 a user by default) but many watches.
type Watcher struct {
	mu    sync.Mutex
	file  *os.File
	users int
	// noInotify makes every follower poll.
	noInotify bool
	watchs    map[int32]map[*notifier]struct{}
}

// NewWatcher makes a watcher; it opens inotify only while something is followed.
func NewWatcher() *Watcher { return &Watcher{watchs: map[int32]map[*notifier]struct{}{}} }

// notifier wakes one follower.
type notifier struct {
	w   *Watcher
	ch  chan struct{}
	wds map[int32]struct{}
	// poll: inotify is not to be had, look every so often instead.
	poll, counted bool
}

const pollInterval = 200 * time.Millisecond

func (n *notifier) notify() {
	select {
	case n.ch <- struct{}{}:
	default:
	}
}

const watchMask = unix.IN_MODIFY | unix.IN_MOVE_SELF | unix.IN_DELETE_SELF | unix.IN_ATTRIB | unix.IN_CREATE | unix.IN_MOVED_TO

func (w *Watcher) notifier() *notifier {
	n := &notifier{w: w, ch: make(chan struct{}, 1), wds: map[int32]struct{}{}}
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.noInotify {
		n.poll = true
		return n
	}
	if w.file == nil {
		fd, err := unix.InotifyInit1(unix.IN_CLOEXEC | unix.IN_NONBLOCK)
		if err != nil {
			n.poll = true
			return n
		}
		w.file = os.NewFile(uintptr(fd), "inotify")
		go w.read(w.file)
	}
	w.users++
	n.counted = true
	return n
}

// watch sees to it that changes of the file now at path wake the follower, and
// while there is none, changes of its directory.
func (n *notifier) watch(path string, exists bool) {
	if n.poll {
		return
	}
	n.w.mu.Lock()
	defer n.w.mu.Unlock()
	add := func(p string) bool {
		conn, err := n.w.file.SyscallConn()
		if err != nil {
			return false
		}
		wd := -1
		_ = conn.Control(func(fd uintptr) { wd, err = unix.InotifyAddWatch(int(fd), p, watchMask) })
		if err != nil || wd < 0 {
			return false
		}
		id := int32(wd)
		if n.w.watchs[id] == nil {
			n.w.watchs[id] = map[*notifier]struct{}{}
		}
		n.w.watchs[id][n] = struct{}{}
		n.wds[id] = struct{}{}
		return true
	}
	if !add(path) {
		exists = false
	}
	if !exists && !add(filepath.Dir(path)) {
		n.poll = true
	}
}

func (n *notifier) wake() <-chan struct{} {
	if n.poll {
		time.AfterFunc(pollInterval, n.notify)
	}
	return n.ch
}

func (n *notifier) close() {
	w := n.w
	w.mu.Lock()
	defer w.mu.Unlock()
	for wd := range n.wds {
		set, there := w.watchs[wd]
		delete(set, n)
		if there && len(set) == 0 {
			delete(w.watchs, wd)
			if conn, err := w.file.SyscallConn(); err == nil {
				_ = conn.Control(func(fd uintptr) { _, _ = unix.InotifyRmWatch(int(fd), uint32(wd)) })
			}
		}
	}
	if n.counted {
		if w.users--; w.users == 0 {
			w.file.Close() // ends read
			w.file = nil
			clear(w.watchs)
		}
	}
}

// read passes events on until its file is closed.
func (w *Watcher) read(f *os.File) {
	buf := make([]byte, 4096)
	for {
		n, err := f.Read(buf)
		if err != nil {
			return
		}
		w.mu.Lock()
		if w.file == f {
			for b := buf[:n]; len(b) >= unix.SizeofInotifyEvent; {
				ev := (*unix.InotifyEvent)(unsafe.Pointer(&b[0]))
				w.event(ev)
				b = b[unix.SizeofInotifyEvent+int(ev.Len):]
			}
		}
		w.mu.Unlock()
	}
}

func (w *Watcher) event(ev *unix.InotifyEvent) {
	notify := func(set map[*notifier]struct{}) {
		for n := range set {
			n.notify()
		}
	}
	if ev.Mask&unix.IN_Q_OVERFLOW != 0 {
		for _, set := range w.watchs {
			notify(set)
		}
		return
	}
	set := w.watchs[ev.Wd]
	notify(set)
	if ev.Mask&unix.IN_IGNORED != 0 { // the inode is gone; its number may be used again
		for n := range set {
			delete(n.wds, ev.Wd)
		}
		delete(w.watchs, ev.Wd)
	}
}
