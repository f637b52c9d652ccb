//go:build unix

package qemu

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"time"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/vm"
)

// Start implements vm.Driver.
func (d *Driver) Start(ctx context.Context, s vm.Spec, h vm.Host, report func(string)) (_ vm.Machine, err error) {
	if s.Image.Kernel == "" {
		return nil, fault.New(fault.Invalid, "this driver boots images in the vm format: cloudos image build --format vm")
	}
	path, err := d.find(program(runtime.GOARCH))
	if err != nil {
		return nil, err
	}
	if err := os.MkdirAll(s.Run, 0o700); err != nil {
		return nil, err
	}
	lock, err := vm.TakeLock(filepath.Join(s.Run, "machine.lock"))
	if err != nil {
		return nil, err
	}
	defer lock.Close()
	removeRemains(s)
	if err := vm.MakeDisk(s.Data, s.Disk); err != nil {
		return nil, err
	}

	l := &launch{user: privateUser(s.State)}
	defer l.close()
	// The lock is inherited: it is held as long as QEMU lives.
	l.give(lock)
	p := plan{goos: runtime.GOOS, goarch: runtime.GOARCH, accelerator: h.Accelerator, spec: s, uuid: machineUUID(s), sandbox: runtime.GOOS == "linux"}
	if err := l.files(&p, s); err != nil {
		return nil, err
	}
	det := detail{UUID: p.uuid, Host: h, Problems: map[string]string{}}
	fsd, fsdErr := d.find("virtiofsd")
	var kept []vm.Share
	if len(s.Shares) > 0 {
		report("serving host folders")
	}
	for i, sh := range s.Shares {
		err := fsdErr
		if runtime.GOOS != "linux" {
			err = errors.New("QEMU shares host folders on Linux alone")
		}
		var conn *os.File
		if err == nil {
			conn, err = serveFolder(ctx, fsd, s, sh, i)
		}
		if err != nil {
			det.Problems[sh.Path] = err.Error()
			continue
		}
		l.own = append(l.own, conn)
		p.share = append(p.share, fmt.Sprintf("fd=%d", l.give(conn)))
		kept = append(kept, sh)
	}
	// Tags are the places in the spec, so a share that is missing moves none.
	p.spec.Shares = kept

	cmd := exec.Command(path, p.args()...)
	said := &tail{max: 16 << 10}
	cmd.Stderr, cmd.Stdout = said, said
	cmd.Dir = "/"
	cmd.Env = []string{"PATH=/usr/bin:/bin", "LC_ALL=C", "TMPDIR=/tmp"}
	cmd.ExtraFiles = l.extra
	cmd.SysProcAttr = processAttributes(l.user)
	report("starting the machine")
	if err := cmd.Start(); err != nil {
		removeRemains(s)
		return nil, fmt.Errorf("cannot run %s: %w", path, err)
	}
	det.PID, det.Birth = cmd.Process.Pid, birth(cmd.Process.Pid)
	m := &Machine{spec: s, detail: det, program: fsd, ended: make(chan struct{}), quit: make(chan struct{}), said: said}
	// What the listeners and the lock are for is QEMU's alone now: a QEMU that ends
	// must not look alive because of us.
	l.close()
	lock.Close()
	died := make(chan struct{})
	go func() { cmd.Wait(); close(died) }()
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	mctx, mcancel := context.WithCancel(ctx)
	defer mcancel()
	go func() {
		select {
		case <-died:
			mcancel()
		case <-mctx.Done():
		}
	}()
	m.mon, err = dialMonitor(mctx, socket(s, "monitor"))
	if err == nil {
		err = m.mon.do(mctx, "cont", nil, nil)
	}
	if err != nil {
		cmd.Process.Kill()
		<-died
		if m.mon != nil {
			m.mon.close()
		}
		removeRemains(s)
		if last := said.last(); last != "" {
			return nil, fault.New(fault.Unavailable, "cannot start the machine: %s", last)
		}
		return nil, fmt.Errorf("cannot start the machine: %w", err)
	}
	go func() {
		<-died
		removeRemains(s)
		close(m.ended)
	}()
	return m, nil
}

// launch gathers what QEMU inherits.
type launch struct {
	user  *unprivileged
	extra []*os.File
	own   []*os.File // to be closed by us afterwards
}

// give hands a file to QEMU and tells its descriptor there.
func (l *launch) give(f *os.File) int {
	l.extra = append(l.extra, f)
	return 2 + len(l.extra)
}

func (l *launch) close() {
	for _, f := range l.own {
		f.Close()
	}
	l.own = nil
}

// files opens disks, kernel and sockets for the plan.
func (l *launch) files(p *plan, s vm.Spec) error {
	open := func(path string, flags int) (int, *os.File, error) {
		f, err := os.OpenFile(path, flags, 0)
		if err != nil {
			return 0, nil, err
		}
		l.own = append(l.own, f)
		return l.give(f), f, nil
	}
	root, _, err := open(s.Image.Root, os.O_RDONLY)
	if err != nil {
		return err
	}
	data, _, err := open(s.Data, os.O_RDWR)
	if err != nil {
		return err
	}
	p.sets = []fdset{{root, 1}, {data, 2}}
	p.root, p.data = "/dev/fdset/1", "/dev/fdset/2"
	for _, f := range []struct {
		path string
		to   *string
	}{{s.Image.Kernel, &p.kernel}, {s.Image.Initrd, &p.initrd}} {
		*f.to = f.path
		if l.user == nil {
			continue
		}
		file, err := readableBy(f.path)
		if err != nil {
			return err
		}
		l.own = append(l.own, file)
		*f.to = fmt.Sprintf("/proc/self/fd/%d", l.give(file))
	}
	for name, to := range map[string]*string{"monitor": &p.monitor, "console": &p.console, "port": &p.port} {
		f, err := listen(socket(s, name))
		if err != nil {
			return err
		}
		l.own = append(l.own, f)
		*to = fmt.Sprintf("fd=%d", l.give(f))
	}
	return nil
}

// listen binds a socket for another process.
func listen(path string) (*os.File, error) {
	if len(path) > 100 {
		return nil, fault.New(fault.Invalid, "the path %s is too long for a socket: set XDG_RUNTIME_DIR or SERVIN_VM_ROOT to a shorter one", path)
	}
	os.Remove(path)
	n, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, err
	}
	n.SetUnlinkOnClose(false)
	defer n.Close()
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, err
	}
	return n.File()
}
