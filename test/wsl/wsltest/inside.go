//go:build linux

package wsltest

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/osinit/distro"
	"github.com/cloudos-io/cloudos/internal/vmwire"
)

// execSimulated does what cloudos-init does in a distribution, but for the machine itself: its port takes connections
// and says nothing.
func (w *wsl) execSimulated(root string, args []string) int {
	d := distro.Distribution{Root: root}
	if args[0] != vmwire.DistributionProgram || len(args) < 2 {
		return w.fail("execvpe(" + args[0] + ") failed: No such file or directory")
	}
	var err error
	switch args[1] {
	case vmwire.DistributionRun:
		var h *distro.Held
		if h, err = d.Hold(args[2], len(args) == 4 && args[3] == vmwire.DistributionFresh); err == nil {
			fmt.Println(vmwire.DistributionStarted)
			for {
				c, err := h.Port.Accept()
				if err != nil {
					return 1
				}
				go func() { _, _ = io.Copy(io.Discard, c); c.Close() }()
			}
		}
	case vmwire.DistributionReplace:
		err = d.Replace(args[2], os.Stdin)
	case vmwire.DistributionBridge:
		err = d.Bridge(context.Background(), os.Stdin, os.Stdout)
	case vmwire.DistributionAlive:
		err = d.Alive()
	case vmwire.DistributionWait:
		err = d.Wait(os.Stdin)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "cloudos-init:", err)
	}
	return distro.Status(err)
}

// execReal runs the program in the distribution's namespaces, which are made when there are none.
func (w *wsl) execReal(name, root string, args []string) int {
	lock, err := os.Create(filepath.Join(w.Dir, name, "lock"))
	if err == nil {
		err = unix.Flock(int(lock.Fd()), unix.LOCK_EX)
	}
	if err != nil {
		return w.fail(err.Error())
	}
	running := w.processes(name)
	if len(running) == 0 {
		pid, err := w.startInit(root)
		if err == nil {
			err = w.enter(name, pid)
		}
		if err != nil {
			return w.fail(err.Error())
		}
		running = []int{pid}
	}
	lock.Close()
	nsenter, err := exec.LookPath("nsenter")
	if err != nil {
		return w.fail(err.Error())
	}
	all := append([]string{nsenter, "--target", strconv.Itoa(running[0]), "--mount", "--uts", "--ipc", "--net", "--pid", "--root", "--wd", "--"}, args...)
	return w.fail(fmt.Sprint(syscall.Exec(nsenter, all, []string{"PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", "HOME=/", "USER=root", "WSL_DISTRO_NAME=" + name})))
}

// startInit starts what stands for WSL's first process in the distribution, and waits until it is ready.
func (w *wsl) startInit(root string) (int, error) {
	ready, told, err := os.Pipe()
	if err != nil {
		return 0, err
	}
	self, err := os.Executable()
	if err != nil {
		return 0, err
	}
	net, err := w.network()
	if err != nil {
		return 0, err
	}
	nsenter, err := exec.LookPath("nsenter")
	if err != nil {
		return 0, err
	}
	cmd := exec.Command(nsenter, "--net="+net, self)
	cmd.Env = []string{envInit + "=" + root, envDrives + "=" + w.Drives, "PATH=" + os.Getenv("PATH")}
	cmd.ExtraFiles = []*os.File{told}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Cloneflags: unix.CLONE_NEWPID | unix.CLONE_NEWNS | unix.CLONE_NEWIPC | unix.CLONE_NEWUTS}
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	told.Close()
	b, err := io.ReadAll(io.LimitReader(ready, 4096))
	if err == nil && string(b) != "ready" {
		err = fmt.Errorf("the distribution does not start: %s", b)
	}
	return cmd.Process.Pid, err
}

// network is the network namespace of the virtual machine, which distributions share and which outlives each of them:
// what one leaves there, the next one finds.
func (w *wsl) network() (string, error) {
	file := filepath.Join(w.Dir, network)
	if _, err := os.Stat(file); err == nil {
		return file, nil
	}
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		return "", err
	}
	if out, err := exec.Command("unshare", "--net="+file, "true").CombinedOutput(); err != nil {
		return "", fmt.Errorf("cannot make a network namespace: %w: %s", err, out)
	}
	return file, nil
}

// network is the file that holds it, among the distributions.
const network = ".network"

// Shutdown ends the virtual machine, which no distribution is running in.
func (h Host) Shutdown() error {
	if err := unix.Unmount(filepath.Join(h.Dir, network), unix.MNT_DETACH); err != nil && !errors.Is(err, unix.ENOENT) {
		return err
	}
	return nil
}

// distributionInit is that process. It does not return.
func distributionInit(root string) {
	told := os.NewFile(3, "told")
	if err := prepare(root, os.Getenv(envDrives)); err != nil {
		fmt.Fprint(told, err)
		os.Exit(1)
	}
	fmt.Fprint(told, "ready")
	told.Close()
	ended := make(chan os.Signal, 8)
	signal.Notify(ended, unix.SIGCHLD)
	for range ended {
		for {
			if pid, err := syscall.Wait4(-1, nil, syscall.WNOHANG, nil); pid <= 0 || err != nil {
				break
			}
		}
	}
}

// prepare makes the mounts that a distribution has when the first program runs in it.
func prepare(root, drives string) error {
	in := func(p string) string { return filepath.Join(root, p) }
	type mount struct {
		source, target, kind string
		flags                uintptr
		options              string
	}
	for _, m := range []mount{
		{"", "/", "", unix.MS_REC | unix.MS_PRIVATE, ""},
		{root, root, "", unix.MS_BIND, ""},
		{"proc", in("proc"), "proc", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
		{"sysfs", in("sys"), "sysfs", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
		{"/sys/fs/cgroup", in("sys/fs/cgroup"), "", unix.MS_BIND | unix.MS_REC, ""},
		{"none", in("dev"), "devtmpfs", unix.MS_NOSUID, "mode=755"},
		{"none", in("run"), "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=755"},
	} {
		if err := unix.Mount(m.source, m.target, m.kind, m.flags, m.options); err != nil {
			return fmt.Errorf("cannot mount %s: %w", m.target, err)
		}
	}
	if drives != "" {
		if err := unix.Mount(drives, in("mnt"), "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
			return err
		}
	}
	conf, err := os.ReadFile(in("etc/wsl.conf"))
	if err != nil || !strings.Contains(string(conf), "systemd=false") {
		return fmt.Errorf("wsl.conf: %w", err)
	}
	if err := os.WriteFile(in("etc/resolv.conf"), []byte("# This file was automatically generated by WSL.\nnameserver 10.255.255.254\n"), 0o644); err != nil {
		return err
	}
	lo, err := netlink.LinkByName("lo")
	if err == nil {
		err = netlink.LinkSetUp(lo)
	}
	if err != nil {
		return err
	}
	if err := unix.Chdir(root); err != nil {
		return err
	}
	if err := unix.PivotRoot(".", "."); err != nil {
		return err
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return err
	}
	return unix.Chdir("/")
}
