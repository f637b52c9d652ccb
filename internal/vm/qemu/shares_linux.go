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
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/vm"
)

// serveFolder starts the file server of a share and gives QEMU's end of its
// socket. The server ends when that end does.
func serveFolder(ctx context.Context, program string, s vm.Spec, sh vm.Share, place int) (*os.File, error) {
	fi, err := os.Stat(sh.Path)
	if err != nil {
		return nil, fmt.Errorf("cannot share it: %w", err)
	}
	if !fi.IsDir() {
		return nil, fault.New(fault.Invalid, "cannot share it: it is no folder")
	}
	path := filepath.Join(s.Run, fmt.Sprintf("share-%d.sock", place))
	l, err := listen(path)
	if err != nil {
		return nil, err
	}
	defer l.Close()
	args, err := serverArgs(program, sh)
	if err != nil {
		return nil, err
	}
	cmd := exec.Command(program, args...)
	if sh.ReadOnly && !slices.Contains(args, "--readonly") {
		// The older server knows no read-only: it gets a mount namespace where the folder is.
		cmd = exec.Command("/bin/sh", append([]string{"-c", readOnlyStage, "sh", sh.Path, program}, args...)...)
	}
	cmd.ExtraFiles = []*os.File{l}
	cmd.Dir = "/"
	cmd.Env = []string{"PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL=C"}
	said := &tail{max: 4 << 10}
	cmd.Stderr, cmd.Stdout = said, said
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if cmd.Path == "/bin/sh" {
		cmd.SysProcAttr.Cloneflags = unix.CLONE_NEWNS
	}
	if uid, gid := os.Geteuid(), os.Getegid(); uid != 0 {
		// Root of a namespace in which only we exist: enough for its sandbox.
		cmd.SysProcAttr.Cloneflags |= unix.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: uid, Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: gid, Size: 1}}
	}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("cannot run %s: %w", program, err)
	}
	died := make(chan struct{})
	go func() { cmd.Wait(); close(died) }()
	var d net.Dialer
	conn, err := d.DialContext(ctx, "unix", path)
	if err != nil {
		cmd.Process.Kill()
		<-died
		return nil, err
	}
	defer conn.Close()
	// What it refuses, it refuses at once.
	select {
	case <-died:
		return nil, errors.New("its file server ended: " + said.last())
	case <-time.After(30 * time.Millisecond):
	}
	return conn.(*net.UnixConn).File()
}

// readOnlyStage makes the folder $1 read-only in the mount namespace that it runs in,
// then becomes the rest.
const readOnlyStage = `set -e; mount --make-rprivate /; mount --rbind "$1" "$1"; mount -o remount,bind,ro "$1"; shift; exec "$@"`

// serverArgs is the command line of a file server for descriptor 3. Debian 12 has
// the older one, of QEMU's own sources, others the one that succeeded it.
func serverArgs(program string, sh vm.Share) ([]string, error) {
	out, err := exec.Command(program, "--help").CombinedOutput()
	if err != nil && len(out) == 0 {
		return nil, fmt.Errorf("cannot run %s: %w", program, err)
	}
	if strings.Contains(string(out), "-o source=PATH") {
		// No device nodes and no file capabilities from inside the guest.
		opts := "source=" + sh.Path + ",sandbox=namespace,cache=auto,xattr,no_posix_lock,modcaps=-mknod:-setfcap,log_level=err"
		return []string{"--fd=3", "-f", "-o", opts}, nil
	}
	args := []string{"--fd=3", "--shared-dir=" + sh.Path, "--sandbox=namespace", "--cache=auto", "--xattr", "--modcaps=-mknod:-setfcap", "--log-level=error"}
	if sh.ReadOnly && strings.Contains(string(out), "--readonly") {
		args = append(args, "--readonly")
	}
	return args, nil
}

// AddShare implements vm.Sharer.
func (m *Machine) AddShare(ctx context.Context, sh vm.Share) error {
	m.mu.Lock()
	place, n := m.detail.Hot, len(m.spec.Shares)
	m.mu.Unlock()
	if place >= hotPorts {
		return fault.New(fault.Exhausted, "%d folders were added since the machine started: restart it", hotPorts)
	}
	if m.program == "" {
		return fault.New(fault.Unsupported, "cannot find the program virtiofsd")
	}
	conn, err := serveFolder(ctx, m.program, m.spec, sh, n)
	if err != nil {
		return err
	}
	defer conn.Close()
	name := fmt.Sprintf("share%d", n)
	if err := m.mon.sendFile(ctx, name, conn); err != nil {
		return err
	}
	if err := m.mon.do(ctx, "chardev-add", map[string]any{"id": name, "backend": map[string]any{"type": "socket",
		"data": map[string]any{"addr": map[string]any{"type": "fd", "data": map[string]any{"str": name}}, "server": false}}}, nil); err != nil {
		return err
	}
	if err := m.mon.do(ctx, "device_add", map[string]any{"driver": "vhost-user-fs-pci", "id": fmt.Sprintf("fs%d", n), "chardev": name,
		"queue-size": 512, "tag": sh.Tag, "bus": fmt.Sprintf("hot%d", place)}, nil); err != nil {
		m.mon.do(ctx, "chardev-remove", map[string]any{"id": name}, nil)
		return err
	}
	m.mu.Lock()
	m.detail.Hot++
	m.spec.Shares = append(slices.Clone(m.spec.Shares), sh)
	delete(m.detail.Problems, sh.Path)
	m.mu.Unlock()
	return nil
}

// sendFile hands a descriptor to QEMU under a name.
func (m *monitor) sendFile(ctx context.Context, name string, f *os.File) error {
	u, ok := m.conn.(*net.UnixConn)
	if !ok {
		return fault.New(fault.Unsupported, "descriptors pass over unix sockets alone")
	}
	// QEMU keeps a descriptor until the next command asks for it.
	if _, _, err := u.WriteMsgUnix([]byte("\n"), unix.UnixRights(int(f.Fd())), nil); err != nil {
		return err
	}
	runtime.KeepAlive(f)
	return m.do(ctx, "getfd", map[string]string{"fdname": name}, nil)
}
