package ociruntime

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/opencontainers/cgroups"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/criu"
)

func (a *app) restore(f *flags) error {
	if unprivileged() || inUserNamespace() {
		a.log.Warnf("checkpoints of rootless containers are untested")
	}
	im, err := openImages(f)
	if err != nil {
		return err
	}
	defer im.close()
	status, err := a.restoreContainer(f, im)
	if err != nil {
		return fmt.Errorf("cannot restore: %w", err)
	}
	if status != 0 {
		return exitCode{code: status}
	}
	return nil
}

func (a *app) restoreContainer(f *flags, im *images) (status int, err error) {
	pidFile, err := absolute(*f.str["pid-file"])
	if err != nil {
		return 0, err
	}
	if dir := *f.str["bundle"]; dir != "" {
		if err := os.Chdir(dir); err != nil {
			return 0, err
		}
	}
	spec, doc, err := readRawSpec(configName)
	if err != nil {
		return 0, err
	}
	id := f.args[0]
	if err := validID(id); err != nil {
		return 0, err
	}
	detach, socket := *f.flag["detach"], *f.str["console-socket"]
	if err := checkTerminal(spec.Process, detach, socket); err != nil {
		return 0, err
	}
	b := &birth{spec: spec, doc: doc, gate: -1, container: &container{app: a, id: id, dir: filepath.Join(a.root, id)}}
	defer func() {
		if err != nil {
			b.undo()
		}
	}()
	defer b.unlock()
	if err := b.prepare(false); err != nil {
		return 0, err
	}
	if b.io, err = a.newStreams(spec.Process, detach, socket, 0, 0); err != nil {
		return 0, err
	}
	defer b.io.close()
	if !detach && !*f.flag["no-subreaper"] {
		if err := unix.Prctl(unix.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0); err != nil {
			return 0, os.NewSyscallError("prctl", err)
		}
	}
	var fg *foreground
	if !detach {
		fg = watchSignals()
		defer fg.stop()
	}
	if err := b.bringBack(f, im); err != nil {
		return 0, err
	}
	b.unlock()
	b.io.connect()
	if pidFile != "" {
		if err := writePIDFile(pidFile, b.proc.pid); err != nil {
			return 0, err
		}
	}
	if detach {
		b.proc.release()
		return 0, nil
	}
	status, err = fg.wait(b.proc, b.io)
	if err == nil {
		if derr := b.destroy(); derr != nil {
			a.log.Warnf("%v", derr)
		}
	}
	return status, err
}

// bringBack has criu make the container's processes, as children of ours.
func (b *birth) bringBack(f *flags, im *images) error {
	root, done, err := b.restoreRoot()
	if err != nil {
		return err
	}
	defer done()
	const log = "restore.log"
	o := im.options(f, log, criuConfig(b.spec.Annotations))
	o.Str(criu.OptRoot, root)
	o.Bool(criu.OptEvasiveDevices, true)
	o.Bool(criu.OptRstSibling, true)
	if v := *f.str["lsm-profile"]; v != "" {
		o.Str(criu.OptLSMProfile, v)
	}
	if v := *f.str["lsm-mount-context"]; v != "" {
		o.Str(criu.OptLSMMountContext, v)
	}
	extra, err := b.restoreNamespaces(o)
	defer func() {
		for _, x := range extra {
			x.Close()
		}
	}()
	if err != nil {
		return err
	}
	if err := b.restoreMounts(o); err != nil {
		return err
	}
	if err := inheritPipes(o, im.path); err != nil {
		return err
	}
	std := [3]*os.File{}
	for i, fd := range b.io.inside {
		dup, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 3)
		if err != nil {
			return os.NewSyscallError("fcntl", err)
		}
		std[i] = os.NewFile(uintptr(dup), "stdio")
		defer std[i].Close()
	}
	s, err := criu.Start(std, extra)
	if err != nil {
		return err
	}
	// What it makes is born in the cgroup that it is in itself.
	if err := b.cg.Apply(s.PID()); err == nil || errors.Is(err, cgroups.ErrRootless) {
		err = b.applyLimits()
		if err == nil {
			err = cgroupRoots(o, s.PID())
		}
		if err != nil {
			_ = s.Close()
			return err
		}
	} else {
		_ = s.Close()
		return fmt.Errorf("unable to apply cgroup configuration: %w", err)
	}
	s.Debug = b.app.log.Debugf
	var req criu.Message
	req.Int(1, criu.Restore)
	req.Bytes(2, *o)
	err = s.CarryOut(req, b.notified)
	cerr := s.Close()
	if err == nil {
		err = cerr
	}
	if err == nil && b.proc == nil {
		err = errors.New("criu told of no process")
	}
	if err != nil {
		quoteErrors(b.app.log, im.logDir(), log)
	}
	return err
}

// notified does what criu asks for while it restores.
func (b *birth) notified(script string, pid int, fds []int) error {
	switch script {
	case "setup-namespaces":
		b.rec.InitPID = pid
		//nolint:staticcheck // prestart is deprecated, not gone
		if err := b.runHooks("prestart", b.hooks().Prestart, specs.StateCreating); err != nil {
			return err
		}
		return b.runHooks("createRuntime", b.hooks().CreateRuntime, specs.StateCreating)
	case "orphan-pts-master":
		if len(fds) != 1 {
			return errors.New("criu sent no terminal")
		}
		fd, err := unix.FcntlInt(uintptr(fds[0]), unix.F_DUPFD_CLOEXEC, 3)
		if err != nil {
			return err
		}
		return b.io.terminal(fd)
	case "post-restore":
		pidfd, err := unix.PidfdOpen(pid, 0)
		if err != nil {
			return os.NewSyscallError("pidfd_open", err)
		}
		b.proc = &process{pid: pid, pidfd: pidfd}
		if _, b.proc.start, err = processStat(pid); err != nil {
			return err
		}
		b.rec.Created = time.Now().UTC()
		return b.record()
	}
	return nil
}

// restoreRoot gives the root as criu wants it: a mount whose parent is not covered.
func (b *birth) restoreRoot() (string, func(), error) {
	root := filepath.Join(b.dir, "criu-root")
	if err := os.Mkdir(root, 0o755); err != nil {
		return "", nil, err
	}
	if err := unix.Mount(b.spec.Root.Path, root, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return "", nil, &os.PathError{Op: "bind", Path: root, Err: err}
	}
	return root, func() {
		_ = unix.Unmount(root, unix.MNT_DETACH)
		_ = os.Remove(root)
	}, nil
}

// restoreNamespaces tells criu of the namespaces that are there already.
func (b *birth) restoreNamespaces(o *criu.Message) (extra []*os.File, err error) {
	for _, n := range b.spec.Linux.Namespaces {
		if n.Path == "" {
			continue
		}
		switch n.Type {
		case specs.NetworkNamespace, specs.PIDNamespace:
			ns, err := os.Open(n.Path)
			if err != nil {
				//lint:ignore ST1005 as callers know it
				return extra, fmt.Errorf("Requested network namespace %v does not exist", n.Path)
			}
			name := map[specs.LinuxNamespaceType]string{specs.NetworkNamespace: "net", specs.PIDNamespace: "pid"}[n.Type]
			var fd criu.Message
			fd.Str(1, criu.NamespaceKey(name))
			fd.Int(2, 4+len(extra)) // after the streams and the socket
			o.Bytes(criu.OptInheritFD, fd)
			extra = append(extra, ns)
		case specs.CgroupNamespace:
			//lint:ignore ST1005 as callers know it
			return extra, fmt.Errorf("Do not know how to handle namespace %v", n.Type)
		default:
			name := string(n.Type)
			if n.Type == specs.MountNamespace {
				name = "mnt"
			}
			o.Pair(criu.OptJoinNS, name, n.Path)
		}
	}
	return extra, nil
}

// restoreMounts tells criu what to mount where, and makes the places.
func (b *birth) restoreMounts(o *criu.Message) error {
	root, err := unix.Open(b.spec.Root.Path, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return &os.PathError{Op: "open", Path: b.spec.Root.Path, Err: err}
	}
	defer unix.Close(root)
	var binds []int
	defer func() {
		for _, fd := range binds {
			_ = unix.Unmount(fmt.Sprintf("/proc/self/fd/%d", fd), unix.MNT_DETACH)
			unix.Close(fd)
		}
	}()
	_, ownCgroups := findNamespace(b.spec, specs.CgroupNamespace)
	for i := range b.spec.Mounts {
		m := &b.spec.Mounts[i]
		if m.Type == "cgroup" || m.Type == "cgroup2" {
			if m.Type == "cgroup" && !ownCgroups && !cgroups.IsCgroup2UnifiedMode() {
				for _, h := range b.opts.V1Controllers {
					o.Pair(criu.OptExtMnt, filepath.Join(m.Destination, strings.TrimPrefix(h, "name=")), b.dirs[h])
				}
			}
			continue
		}
		if b.onTmpfs(m.Destination) {
			if isBind(m) {
				o.Pair(criu.OptExtMnt, filepath.Clean("/"+m.Destination), m.Source)
			}
			continue // criu brings back what is in it
		}
		dir := true
		if isBind(m) {
			st, err := os.Stat(m.Source)
			if err != nil {
				return err
			}
			dir = st.IsDir()
		}
		target, fd, err := criu.Mountpoint(root, m.Destination, dir)
		if err != nil {
			return fmt.Errorf("create criu restore mountpoint for %s mount: %w", m.Destination, err)
		}
		if !isBind(m) {
			unix.Close(fd)
			continue
		}
		// Places below it are made in what is mounted there.
		if err := unix.Mount(m.Source, fmt.Sprintf("/proc/self/fd/%d", fd), "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
			unix.Close(fd)
			return &os.PathError{Op: "bind", Path: m.Destination, Err: err}
		}
		unix.Close(fd)
		// Opened anew, it is the mount.
		if fd, err = criu.OpenIn(root, target); err != nil {
			return err
		}
		binds = append(binds, fd)
		o.Pair(criu.OptExtMnt, target, m.Source)
	}
	if len(b.spec.Linux.MaskedPaths) > 0 {
		o.Pair(criu.OptExtMnt, "/dev/null", "/dev/null")
	}
	if b.rec.Servin.UserNS {
		for _, d := range append([]string{"/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty"}, devicePaths(b.spec)...) {
			o.Pair(criu.OptExtMnt, d, d)
		}
	}
	return nil
}

func (b *birth) onTmpfs(path string) bool {
	for i := range b.spec.Mounts {
		if m := &b.spec.Mounts[i]; m.Type == "tmpfs" && strings.HasPrefix(filepath.Clean("/"+path), filepath.Clean("/"+m.Destination)+"/") {
			return true
		}
	}
	return false
}

// inheritPipes has the restored process use our pipes in the place of those that it
// had at the checkpoint.
func inheritPipes(o *criu.Message, dir string) error {
	data, err := os.ReadFile(filepath.Join(dir, descriptorsName))
	if err != nil {
		return err
	}
	var fds []string
	if err := json.Unmarshal(data, &fds); err != nil {
		return fmt.Errorf("cannot read %s: %w", descriptorsName, err)
	}
	for i, name := range fds {
		if i < 3 && strings.Contains(name, "pipe:") {
			var fd criu.Message
			fd.Str(1, name)
			fd.Int(2, i)
			o.Bytes(criu.OptInheritFD, fd)
		}
	}
	return nil
}

// cgroupRoots tells criu where the container's groups are now.
func cgroupRoots(o *criu.Message, pid int) error {
	paths, err := cgroups.ParseCgroupFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		return err
	}
	for ctrl, p := range paths {
		o.Pair(criu.OptCgRoot, ctrl, p)
	}
	return nil
}
