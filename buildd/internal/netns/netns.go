// Package netns gives build steps networks: namespaces that this program makes
// and the engine connects to its default bridge.
package netns

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"sync"
	"time"

	resources "github.com/moby/buildkit/executor/resources/types"
	"github.com/moby/buildkit/identity"
	"github.com/moby/buildkit/util/network"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/build/contract"
)

// Provider makes networks for steps. One is kept ready, so that a step need not
// wait for its own, and used ones are given back behind the steps' backs.
type Provider struct {
	engine contract.Engine
	dir    string

	mu     sync.Mutex
	ready  *namespace
	making bool
	closed bool
	work   sync.WaitGroup
}

// keepReady is how long an unused network is kept.
const keepReady = 10 * time.Second

// New makes a Provider that keeps namespaces in dir.
func New(e contract.Engine, dir string) (*Provider, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("cannot make the directory of networks: %w", err)
	}
	return &Provider{engine: e, dir: dir}, nil
}

// Close gives everything back.
func (p *Provider) Close() error {
	p.mu.Lock()
	p.closed = true
	n := p.ready
	p.ready = nil
	p.mu.Unlock()
	var err error
	if n != nil {
		err = n.release()
	}
	p.work.Wait()
	return err
}

// New gives out a network.
func (p *Provider) New(ctx context.Context, hostname string, _ network.NamespaceOptions) (network.Namespace, error) {
	if hostname != "" {
		return p.attach(ctx, hostname)
	}
	p.mu.Lock()
	n := p.ready
	p.ready = nil
	p.mu.Unlock()
	defer p.prepare()
	if n != nil {
		n.timer.Stop()
		return n, nil
	}
	return p.attach(ctx, "")
}

// prepare makes the next network.
func (p *Provider) prepare() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.ready != nil || p.making || p.closed {
		return
	}
	p.making = true
	p.work.Go(func() {
		n, err := p.attach(context.Background(), "")
		p.mu.Lock()
		defer p.mu.Unlock()
		p.making = false
		switch {
		case err != nil: // whoever needs one will be told
		case p.closed:
			p.work.Go(func() { _ = n.release() })
		default:
			p.ready = n
			n.timer = time.AfterFunc(keepReady, func() { p.expire(n) })
		}
	})
}

// expire gives back a network that nobody wanted.
func (p *Provider) expire(n *namespace) {
	p.mu.Lock()
	mine := p.ready == n
	if mine {
		p.ready = nil
	}
	p.mu.Unlock()
	if mine {
		_ = n.release()
	}
}

// attach makes a network.
func (p *Provider) attach(ctx context.Context, hostname string) (*namespace, error) {
	id := "build-" + identity.NewID()
	n := &namespace{p: p, id: id, path: filepath.Join(p.dir, id)}
	f, err := n.make()
	if err != nil {
		return nil, fmt.Errorf("cannot make a network for a build step: %w", err)
	}
	defer f.Close()
	n.attached = true
	if _, err := p.engine.Attach(ctx, contract.AttachRequest{ID: id, Hostname: hostname, FD: int(f.Fd())}); err != nil {
		return nil, errors.Join(fmt.Errorf("cannot connect a build step: %w", err), n.release())
	}
	return n, nil
}

type namespace struct {
	p        *Provider
	id, path string
	attached bool
	timer    *time.Timer
	once     sync.Once
	err      error
}

// make creates the namespace, bound to a file so that it outlives its maker, with
// the loopback link up.
func (n *namespace) make() (*os.File, error) {
	f, err := os.OpenFile(n.path, os.O_CREATE|os.O_EXCL, 0o400)
	if err != nil {
		return nil, err
	}
	_ = f.Close()
	failed := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends with this goroutine
		failed <- func() error {
			if err := unix.Unshare(unix.CLONE_NEWNET); err != nil {
				return os.NewSyscallError("unshare", err)
			}
			if err := loopbackUp(); err != nil {
				return err
			}
			return os.NewSyscallError("mount", unix.Mount(fmt.Sprintf("/proc/self/task/%d/ns/net", unix.Gettid()), n.path, "", unix.MS_BIND, ""))
		}()
	}()
	if err := <-failed; err != nil {
		_ = os.Remove(n.path)
		return nil, err
	}
	return os.Open(n.path)
}

func loopbackUp() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return os.NewSyscallError("socket", err)
	}
	defer unix.Close(fd)
	r, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	r.SetUint16(unix.IFF_UP | unix.IFF_RUNNING)
	return os.NewSyscallError("ioctl", unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, r))
}

// Set puts the namespace into a step's configuration.
func (n *namespace) Set(s *specs.Spec) error {
	for i := range s.Linux.Namespaces {
		if s.Linux.Namespaces[i].Type == specs.NetworkNamespace {
			s.Linux.Namespaces[i].Path = n.path
			return nil
		}
	}
	s.Linux.Namespaces = append(s.Linux.Namespaces, specs.LinuxNamespace{Type: specs.NetworkNamespace, Path: n.path})
	return nil
}

// Sample tells nothing: the engine counts.
func (n *namespace) Sample() (*resources.NetworkSample, error) { return nil, nil }

// Close gives the network back, in its own time.
func (n *namespace) Close() error {
	n.p.work.Go(func() { _ = n.release() })
	return nil
}

func (n *namespace) release() error {
	n.once.Do(func() {
		var errs []error
		if n.attached {
			errs = append(errs, n.p.engine.Release(context.Background(), contract.ReleaseRequest{ID: n.id}))
		}
		errs = append(errs, os.NewSyscallError("umount", unix.Unmount(n.path, unix.MNT_DETACH)), os.Remove(n.path))
		n.err = errors.Join(errs...)
	})
	return n.err
}
