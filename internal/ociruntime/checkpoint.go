package ociruntime

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"github.com/opencontainers/cgroups"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/criu"
)

const descriptorsName = "descriptors.json"

func imageFlags(f *flags) {
	f.text("image-path", "", "path for criu image files (default: checkpoint in the current directory)")
	f.text("work-path", "", "path for saving work files and logs")
	f.boolean("tcp-established", "allow open tcp connections")
	f.boolean("ext-unix-sk", "allow external unix sockets")
	f.boolean("shell-job", "allow shell jobs")
	f.boolean("file-locks", "handle file locks, for safety")
	f.text("manage-cgroups-mode", "", "cgroups mode: soft|full|strict|ignore (default: soft)")
	f.strings("empty-ns", "create a namespace, but don't restore its properties")
	f.boolean("auto-dedup", "enable auto deduplication of memory images")
	f.boolean("lazy-pages", "use userfaultfd to lazily restore memory pages")
}

func checkpointFlags(f *flags) {
	imageFlags(f)
	f.text("parent-path", "", "path for previous criu image files in pre-dump, relative to the image path")
	f.boolean("leave-running", "leave the process running after checkpointing")
	f.boolean("tcp-skip-in-flight", "skip in-flight tcp connections")
	f.boolean("link-remap", "allow one to link unlinked files back when possible")
	f.text("status-fd", "-1", "criu writes \\0 to this FD once lazy-pages is ready")
	f.text("page-server", "", "ADDRESS:PORT of the page server")
	f.boolean("pre-dump", "dump container's memory information only, leave the container running after this")
}

func restoreFlags(f *flags) {
	imageFlags(f)
	f.text("console-socket", "", "path to an AF_UNIX socket which will receive a file descriptor referencing the master end of the console's pseudoterminal")
	f.text("bundle,b", "", "path to the root of the bundle directory")
	f.boolean("detach,d", "detach from the container's process")
	f.text("pid-file", "", "specify the file to write the process id to")
	f.boolean("no-subreaper", "disable the use of the subreaper used to reap reparented processes")
	f.boolean("no-pivot", "")
	f.text("lsm-profile", "", "LSM profile to be used during restore, as TYPE:NAME")
	f.text("lsm-mount-context", "", "LSM mount context to be used during restore")
}

// images are the directories of one checkpoint.
type images struct {
	path, work, parent string
	dir, workDir       *os.File
	mode               int // of cgroups
	emptyNS            uint64
}

func openImages(f *flags) (im *images, err error) {
	im = &images{path: *f.str["image-path"], work: *f.str["work-path"], emptyNS: unix.CLONE_NEWNET} // the network is the engine's
	if im.path == "" {
		wd, err := os.Getwd()
		if err != nil {
			return nil, err
		}
		im.path = filepath.Join(wd, "checkpoint")
	}
	modes := map[string]int{"": 6, "soft": 3, "full": 4, "strict": 5, "ignore": 0}
	mode, ok := modes[*f.str["manage-cgroups-mode"]]
	if !ok {
		return nil, errors.New("invalid manage-cgroups-mode value")
	}
	im.mode = mode
	for _, ns := range *f.many["empty-ns"] {
		if ns != string(specs.NetworkNamespace) {
			return nil, fmt.Errorf("namespace %q is not supported", ns)
		}
	}
	if err := os.MkdirAll(im.path, 0o700); err != nil {
		return nil, err
	}
	if p := f.str["parent-path"]; p != nil && *p != "" {
		if filepath.IsAbs(*p) {
			return nil, errors.New("--parent-path must be relative")
		}
		st, err := os.Stat(filepath.Join(im.path, *p))
		if err == nil && !st.IsDir() {
			err = &os.PathError{Op: "open", Path: *p, Err: unix.ENOTDIR}
		}
		if err != nil {
			return nil, fmt.Errorf("invalid --parent-path: %w", err)
		}
		im.parent = *p
	}
	if im.dir, err = os.Open(im.path); err != nil {
		return nil, err
	}
	if im.work != "" {
		if err = os.MkdirAll(im.work, 0o700); err == nil {
			im.workDir, err = os.Open(im.work)
		}
		if err != nil {
			im.dir.Close()
			return nil, err
		}
	}
	return im, nil
}

func (im *images) close() {
	im.dir.Close()
	if im.workDir != nil {
		im.workDir.Close()
	}
}

func (im *images) logDir() string {
	if im.work != "" {
		return im.work
	}
	return im.path
}

// options are what dump and restore have in common.
func (im *images) options(f *flags, log, config string) *criu.Message {
	var o criu.Message
	o.Int(criu.OptImagesDirFD, int(im.dir.Fd()))
	if im.workDir != nil {
		o.Int(criu.OptWorkDirFD, int(im.workDir.Fd()))
	}
	o.Int(criu.OptLogLevel, 4)
	o.Str(criu.OptLogFile, log)
	o.Bool(criu.OptNotifyScripts, true)
	o.Bool(criu.OptManageCgroups, true)
	o.Int(criu.OptManageCgroupMode, im.mode)
	o.Uint(criu.OptEmptyNS, im.emptyNS)
	o.Bool(criu.OptOrphanPtsMaster, true)
	for name, field := range map[string]int{"tcp-established": criu.OptTCPEstablished, "ext-unix-sk": criu.OptExtUnixSk, "shell-job": criu.OptShellJob,
		"file-locks": criu.OptFileLocks, "auto-dedup": criu.OptAutoDedup, "lazy-pages": criu.OptLazyPages, "leave-running": criu.OptLeaveRunning,
		"tcp-skip-in-flight": criu.OptTCPSkipInFlight, "link-remap": criu.OptLinkRemap} {
		if v := f.flag[name]; v != nil {
			o.Bool(field, *v)
		}
	}
	if config != "" {
		o.Str(criu.OptConfigFile, config)
	}
	return &o
}

// criuConfig is the file with further options of the container's, "" for none.
func criuConfig(annotations map[string]string) string {
	if c, ok := annotations["org.criu.config"]; ok {
		return c
	}
	return "/etc/criu/runc.conf"
}

func (a *app) checkpoint(f *flags) error {
	if unprivileged() || inUserNamespace() {
		a.log.Warnf("checkpoints of rootless containers are untested")
	}
	c, err := a.load(f.args[0])
	if err != nil {
		return err
	}
	lock, err := c.lock()
	if err != nil {
		return err
	}
	defer lock.Close()
	status, err := c.status()
	if err != nil {
		return err
	}
	if status == statusCreated || status == statusStopped {
		//lint:ignore ST1005 as callers know it
		return fmt.Errorf("Container cannot be checkpointed in %s state", status)
	}
	im, err := openImages(f)
	if err != nil {
		return err
	}
	defer im.close()
	if err := c.dump(f, im); err != nil {
		return fmt.Errorf("cannot checkpoint container %s: %w", c.id, err)
	}
	if *f.flag["leave-running"] || *f.flag["pre-dump"] {
		return nil
	}
	if err := c.killAndDestroy(); err != nil {
		a.log.Warnf("%v", err)
	}
	return nil
}

// dump has criu write the container's processes down.
func (c *container) dump(f *flags, im *images) error {
	spec, err := c.spec()
	if err != nil {
		return err
	}
	v, err := criu.Version()
	if err != nil {
		return err
	}
	if v < 31100 {
		return fmt.Errorf("criu is version %d, and 3.11 is the least that serves", v)
	}
	kind, pre := criu.Dump, *f.flag["pre-dump"]
	if pre {
		kind = criu.PreDump
	}
	const log = "dump.log"
	o := im.options(f, log, criuConfig(c.rec.Servin.Annotations))
	o.Str(criu.OptRoot, c.rec.Config.Rootfs)
	o.Int(criu.OptPID, c.rec.InitPID)
	for _, n := range c.rec.Config.Namespaces {
		// One that was given stays out of it, and is expected at the restore.
		name := map[string]string{"NEWNET": "net", "NEWPID": "pid"}[n.Type]
		if name == "" || n.Path == "" {
			continue
		}
		var st unix.Stat_t
		if err := unix.Stat(n.Path, &st); err != nil {
			return &os.PathError{Op: "stat", Path: n.Path, Err: err}
		}
		o.Str(criu.OptExternal, fmt.Sprintf("%s[%d]:%s", name, st.Ino, criu.NamespaceKey(name)))
	}
	if fr := c.cg.Path("freezer"); fr != "" && (!cgroups.IsCgroup2UnifiedMode() || v >= 31400) {
		o.Str(criu.OptFreezeCgroup, fr)
	}
	if ps := *f.str["page-server"]; ps != "" {
		host, port, err := net.SplitHostPort(ps)
		n, perr := strconv.Atoi(port)
		if err != nil || perr != nil || host == "" {
			//lint:ignore ST1005 as callers know it
			return errors.New("Use --page-server ADDRESS:PORT to specify page server")
		}
		var p criu.Message
		p.Str(1, host)
		p.Int(2, n)
		o.Bytes(criu.OptPageServer, p)
	}
	if im.parent != "" {
		o.Str(criu.OptParentImg, im.parent)
		o.Bool(criu.OptTrackMem, true)
	}
	statusFD, err := statusDescriptor(f)
	if err != nil {
		return err
	}
	if !pre {
		for _, m := range c.externalMounts(spec) {
			o.Pair(criu.OptExtMnt, m, m)
		}
		for _, p := range c.maskedFiles(spec) {
			o.Pair(criu.OptExtMnt, p, "/dev/null")
		}
		b, err := json.Marshal(c.rec.Descriptors)
		if err == nil {
			err = os.WriteFile(filepath.Join(im.path, descriptorsName), b, 0o600)
		}
		if err != nil {
			return err
		}
	}
	s, err := criu.Start([3]*os.File{}, nil)
	if err != nil {
		return err
	}
	s.Debug = c.app.log.Debugf
	var req criu.Message
	req.Int(1, kind)
	req.Bytes(2, *o)
	err = s.CarryOut(req, func(script string, _ int, _ []int) error {
		if script == "status-ready" && statusFD >= 0 {
			_, werr := unix.Write(statusFD, []byte{0})
			unix.Close(statusFD)
			statusFD = -1
			return werr
		}
		return nil
	})
	cerr := s.Close()
	if err == nil && !pre {
		err = cerr // after a pre-dump it waits for more, and does not mind
	}
	if err != nil {
		quoteErrors(c.app.log, im.logDir(), log)
	}
	return err
}

func statusDescriptor(f *flags) (int, error) {
	fd, err := strconv.Atoi(*f.str["status-fd"])
	if err != nil || fd < 0 {
		return -1, nil
	}
	fl, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0)
	if err != nil {
		return -1, fmt.Errorf("invalid --status-fd argument %d: %w", fd, err)
	}
	if fl&unix.O_ACCMODE == unix.O_RDONLY {
		return -1, fmt.Errorf("invalid --status-fd argument %d: not writable", fd)
	}
	return fd, nil
}

func isBind(m *specs.Mount) bool {
	return m.Type == "bind" || slices.ContainsFunc(m.Options, func(o string) bool { return o == "bind" || o == "rbind" })
}

// externalMounts are the places in the container where something of the host's is
// mounted: binds, v1 cgroups without a namespace, device nodes in user namespaces.
func (c *container) externalMounts(spec *specs.Spec) []string {
	var out []string
	_, ownCgroups := findNamespace(spec, specs.CgroupNamespace)
	for i := range spec.Mounts {
		m := &spec.Mounts[i]
		switch {
		case isBind(m):
			out = append(out, c.inside(m.Destination))
		case m.Type == "cgroup" && !ownCgroups && !cgroups.IsCgroup2UnifiedMode():
			for _, h := range c.hierarchies() {
				out = append(out, filepath.Join(c.inside(m.Destination), strings.TrimPrefix(h, "name=")))
			}
		}
	}
	if c.rec.Servin.UserNS {
		for _, d := range append([]string{"/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty"}, devicePaths(spec)...) {
			if !slices.Contains(out, d) {
				out = append(out, d)
			}
		}
	}
	return out
}

func devicePaths(spec *specs.Spec) (out []string) {
	for _, d := range spec.Linux.Devices {
		out = append(out, filepath.Clean(d.Path))
	}
	return out
}

func (c *container) hierarchies() []string {
	_, names, _ := byHierarchy(c.cg.GetPaths())
	return names
}

// inside resolves a path in the container's root, as its mount was.
func (c *container) inside(path string) string {
	root := fmt.Sprintf("/proc/%d/root", c.rec.InitPID)
	if c.rec.InitPID == 0 {
		root = c.rec.Config.Rootfs
	}
	dir, err := unix.Open(root, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return filepath.Clean("/" + path)
	}
	defer unix.Close(dir)
	fd, err := unix.Openat2(dir, path, &unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT})
	if err != nil {
		return filepath.Clean("/" + path)
	}
	defer unix.Close(fd)
	base, _ := os.Readlink("/proc/self/fd/" + strconv.Itoa(dir))
	real, err := os.Readlink("/proc/self/fd/" + strconv.Itoa(fd))
	if err != nil {
		return filepath.Clean("/" + path)
	}
	if rel, ok := strings.CutPrefix(real, strings.TrimSuffix(base, "/")+"/"); ok {
		return "/" + rel
	}
	return filepath.Clean("/" + path)
}

// maskedFiles are the masked paths that are files there.
func (c *container) maskedFiles(spec *specs.Spec) (out []string) {
	for _, p := range spec.Linux.MaskedPaths {
		st, err := os.Stat(fmt.Sprintf("/proc/%d/root/%s", c.rec.InitPID, p))
		if err == nil && !st.IsDir() {
			out = append(out, p)
		}
	}
	return out
}
