package overlay

import (
	"fmt"
	"os"
	"runtime"
	"sync"
	"syscall"

	"github.com/cloudos-io/cloudos/internal/snapshot"
	"golang.org/x/sys/unix"
)

func identity(m snapshot.IDMap) bool { return len(m.UIDs) == 0 && len(m.GIDs) == 0 }

// userNamespaces keeps the last few user namespaces made for a mapping: mounts
// of one mapping come in bursts.
type userNamespaces struct {
	mu   sync.Mutex
	open []*userNamespace // most recent last
}

type userNamespace struct {
	key  string
	f    *os.File
	refs int
	gone bool // closed when refs drops to zero
}

const namespacesKept = 8

// get returns a user namespace with the mapping and a function that gives it back.
func (u *userNamespaces) get(m snapshot.IDMap) (*os.File, func(), error) {
	key := fmt.Sprint(m)
	u.mu.Lock()
	defer u.mu.Unlock()
	for i, n := range u.open {
		if n.key == key {
			u.open = append(append(u.open[:i:i], u.open[i+1:]...), n)
			n.refs++
			return n.f, func() { u.put(n) }, nil
		}
	}
	f, err := newUserNamespace(m)
	if err != nil {
		return nil, nil, err
	}
	n := &userNamespace{key: key, f: f, refs: 1}
	u.open = append(u.open, n)
	if len(u.open) > namespacesKept {
		old := u.open[0]
		u.open = append([]*userNamespace(nil), u.open[1:]...)
		old.gone = true
		if old.refs == 0 {
			old.f.Close()
		}
	}
	return f, func() { u.put(n) }, nil
}

func (u *userNamespaces) put(n *userNamespace) {
	u.mu.Lock()
	defer u.mu.Unlock()
	n.refs--
	if n.gone && n.refs == 0 {
		n.f.Close()
	}
}

// rootOnDisk is the id under which the host's root appears on a mapped layer.
const rootOnDisk = 0xfffffffe

// withRoot adds the host's root to a mapping that lacks it: overlayfs makes its
// work directory as whoever mounts, and cannot if that one has no id there.
func withRoot(m []syscall.SysProcIDMap) []syscall.SysProcIDMap {
	for _, r := range m {
		if r.HostID == 0 || r.ContainerID+r.Size > rootOnDisk {
			return m
		}
	}
	return append(m, syscall.SysProcIDMap{ContainerID: rootOnDisk, HostID: 0, Size: 1})
}

// newUserNamespace makes a user namespace by starting a traced process in one:
// the process stops at its exec, before it runs anything, and is killed there.
func newUserNamespace(m snapshot.IDMap) (*os.File, error) {
	runtime.LockOSThread() // the tracer is a thread
	defer runtime.UnlockOSThread()
	conv := func(rs []snapshot.IDRange) []syscall.SysProcIDMap {
		out := make([]syscall.SysProcIDMap, len(rs))
		for i, r := range rs {
			out[i] = syscall.SysProcIDMap{ContainerID: int(r.Container), HostID: int(r.Host), Size: int(r.Size)}
		}
		return withRoot(out)
	}
	p, err := os.StartProcess("/proc/self/exe", []string{"userns"}, &os.ProcAttr{Sys: &syscall.SysProcAttr{
		Cloneflags:                 unix.CLONE_NEWUSER,
		UidMappings:                conv(m.UIDs),
		GidMappings:                conv(m.GIDs),
		GidMappingsEnableSetgroups: true,
		Ptrace:                     true,
		Pdeathsig:                  unix.SIGKILL,
	}})
	if err != nil {
		return nil, fmt.Errorf("cannot make a user namespace: %w", err)
	}
	defer func() {
		_ = p.Kill()
		_, _ = p.Wait()
	}()
	f, err := os.Open(fmt.Sprintf("/proc/%d/ns/user", p.Pid))
	if err != nil {
		return nil, fmt.Errorf("cannot open a user namespace: %w", err)
	}
	return f, nil
}
