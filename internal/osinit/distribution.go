package osinit

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/osinit/config"
	"github.com/cloudos-io/cloudos/internal/osinit/distro"
	"github.com/cloudos-io/cloudos/internal/osinit/guest"
	"github.com/cloudos-io/cloudos/internal/osinit/modules"
	"github.com/cloudos-io/cloudos/internal/osinit/source"
	"github.com/cloudos-io/cloudos/internal/vmwire"
)

// distribution does what the program is asked to in a distribution of WSL2 (ADR 58), and returns the status to
// end with; false is that it was asked nothing of the kind.
func distribution(version string, args []string) (status int, ok bool) {
	d, err := distro.Distribution{Root: "/"}, error(nil)
	word := strings.Join(args[:min(1, len(args))], "")
	switch {
	case os.Getpid() == 1 && (word != distro.Word || len(args) != 1):
		return 0, false // the kernel hands on words of its command line
	case word == distro.Word && os.Getpid() == 1:
		err = runInDistribution(version)
	case word == vmwire.DistributionRun && (len(args) == 2 || len(args) == 3 && args[2] == vmwire.DistributionFresh):
		err = d.Run(args[1], len(args) == 3)
	case word == vmwire.DistributionReplace && len(args) == 2:
		err = d.Replace(args[1], os.Stdin)
	case word == vmwire.DistributionBridge && len(args) == 1:
		err = d.Bridge(context.Background(), os.Stdin, os.Stdout)
	case word == vmwire.DistributionAlive && len(args) == 1:
		err = d.Alive()
	case word == vmwire.DistributionWait && len(args) == 1:
		err = d.Wait(os.Stdin)
	default:
		return 0, false
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "cloudos-init:", err)
	}
	return distro.Status(err), true
}

// runInDistribution is the machine, as the first process of its namespaces.
func runInDistribution(version string) (err error) {
	signal.Ignore(unix.SIGHUP, unix.SIGPIPE)
	m := newMachine(version)
	m.distribution = true
	m.cmdline = map[string]string{}
	if fd, err := unix.FcntlInt(1, unix.F_DUPFD_CLOEXEC, 3); err == nil {
		m.log.console = &short{w: os.NewFile(uintptr(fd), "console"), left: maxConsole}
	}
	defer func() {
		if r := recover(); r != nil {
			m.log.Printf("the first process failed: %v\n%s", r, debug.Stack())
			err = errors.New("the first process failed")
		}
	}()
	port, err := distro.Inherited()
	if err != nil {
		return err
	}
	m.mark("init")
	drives, err := distributionRoot()
	if err != nil {
		return err
	}
	m.drives = drives
	m.runDistribution(context.Background(), port)
	m.log.Printf("the machine is down")
	return nil
}

// maxConsole bounds what is written to a file of the host's that nobody rotates.
const maxConsole = 1 << 20

// short takes so many bytes and drops the rest.
type short struct {
	w    *os.File
	left int
}

func (s *short) Write(p []byte) (int, error) {
	if s.left > 0 {
		s.left -= len(p)
		_, _ = s.w.Write(p) // nobody may listen any more
	}
	return len(p), nil
}

// Places of a distribution, as the machine has them.
const (
	distroRoot   = "/run/cloudos-root" // of WSL's root, where ours is made
	hiddenDrives = "/run/cloudos/drives"
)

// distributionRoot makes the machine's root: the programs, read-only, what is kept, and the kernel's
// file systems. Of WSL's root it keeps Windows' drives, out of everybody's sight: the descriptor reaches them.
func distributionRoot() (drives int, err error) {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return -1, fmt.Errorf("cannot set the mounts apart: %w", err)
	}
	programs, err := filepath.EvalSymlinks("/" + vmwire.DistributionSystem)
	if err != nil {
		return -1, fmt.Errorf("cannot find the programs: %w", err)
	}
	if err := os.Mkdir(distroRoot, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
		return -1, err
	}
	in := func(name string) string { return filepath.Join(distroRoot, name) }
	const plain = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	if err := unix.Mount("root", distroRoot, "tmpfs", unix.MS_NODEV|unix.MS_NOATIME, "mode=755,size=16m"); err != nil {
		return -1, fmt.Errorf("cannot mount the root: %w", err)
	}
	for _, d := range []string{"system", "proc", "sys", "dev", "var", "run"} {
		if err := os.Mkdir(in(d), 0o755); err != nil {
			return -1, err
		}
	}
	resolv, err := os.ReadFile("/etc/resolv.conf")
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return -1, fmt.Errorf("cannot read WSL's name servers: %w", err)
	}
	for _, x := range []mount{
		{programs, "system", "", unix.MS_BIND, ""},
		{"", "system", "", unix.MS_BIND | unix.MS_REMOUNT | unix.MS_RDONLY | unix.MS_NODEV | unix.MS_NOSUID, ""},
		{"/" + vmwire.DistributionData, "var", "", unix.MS_BIND, ""},
		{"proc", "proc", "proc", plain, ""},
		{"sysfs", "sys", "sysfs", plain, ""},
		{"/dev", "dev", "", unix.MS_BIND, ""},
		{"tmpfs", "run", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=755"},
	} {
		if err := unix.Mount(x.source, in(x.target), x.kind, x.flags, x.options); err != nil {
			return -1, fmt.Errorf("cannot mount /%s: %w", x.target, err)
		}
	}
	if err := distributionCgroups(in("sys/fs/cgroup")); err != nil {
		return -1, err
	}
	for _, d := range []string{"run/cloudos", "run/cloudos/drives", "run/cloudos/etc"} {
		if err := os.Mkdir(in(d), 0o755); err != nil {
			return -1, err
		}
	}
	if err := os.WriteFile(in("run/cloudos/etc/resolv.conf"), resolv, 0o644); err != nil {
		return -1, err
	}
	if err := unix.Mount(vmwire.DistributionDrives, in(hiddenDrives), "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
		return -1, fmt.Errorf("cannot keep Windows' drives: %w", err)
	}
	if drives, err = unix.Open(in(hiddenDrives), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0); err != nil {
		return -1, fmt.Errorf("cannot keep Windows' drives: %w", err)
	}
	if err := unix.Mount("hidden", in(hiddenDrives), "tmpfs", plain|unix.MS_RDONLY, "mode=0,size=4k"); err != nil {
		return -1, fmt.Errorf("cannot hide Windows' drives: %w", err)
	}
	if err := unix.Chdir(distroRoot); err != nil {
		return -1, err
	}
	if err := unix.PivotRoot(".", "."); err != nil {
		return -1, fmt.Errorf("cannot make the root the machine's: %w", err)
	}
	if err := unix.Unmount(".", unix.MNT_DETACH); err != nil {
		return -1, fmt.Errorf("cannot leave WSL's root: %w", err)
	}
	return drives, unix.Chdir("/")
}

// distributionCgroups mounts the control groups as WSL has them: of version 2, or both side by side.
func distributionCgroups(place string) error {
	var st unix.Statfs_t
	if err := unix.Statfs("/sys/fs/cgroup", &st); err == nil && (st.Type == unix.CGROUP2_SUPER_MAGIC || st.Type == unix.TMPFS_MAGIC) {
		if err := unix.Mount("/sys/fs/cgroup", place, "", unix.MS_BIND|unix.MS_REC, ""); err != nil {
			return fmt.Errorf("cannot mount the control groups: %w", err)
		}
		return nil
	}
	if err := unix.Mount("cgroup2", place, "cgroup2", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "nsdelegate,memory_recursiveprot"); err != nil {
		return fmt.Errorf("cannot mount the control groups: %w", err)
	}
	return nil
}

// runDistribution brings the machine up and returns when it is down again.
func (m *machine) runDistribution(ctx context.Context, l net.Listener) {
	if err := layRoot("/"); err != nil {
		m.fatal(err)
	}
	m.modules = modules.None()
	m.laterInDistribution()
	m.mark("root")
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	var parts sync.WaitGroup
	parts.Go(func() { m.table.Run(ctx) })
	port := &guest.Port{Engine: m.dialEngine, Log: m.log.Printf}
	port.Control = guest.NewControl(m, port.Streams)
	parts.Go(func() {
		if err := port.Serve(ctx, l); err != nil && ctx.Err() == nil {
			m.problem(err)
		}
	})
	m.mu.Lock()
	m.dataKind = "disk" // WSL's own, of which this is a folder
	m.mu.Unlock()
	m.dataFolders()
	m.mark("data")
	doc, err := m.configureDistribution(ctx)
	m.apply(ctx, doc)
	m.tuneDistribution(doc.Sysctl)
	m.mark("config")
	engineCtx, stopEngine := context.WithCancel(ctx)
	engineDone := make(chan struct{})
	if err != nil {
		m.problem(err)
		m.setState(vmwire.StateSafe)
		close(engineDone)
	} else {
		go func() { defer close(engineDone); m.runEngine(engineCtx) }()
	}
	parts.Go(func() {
		if m.awaitReady(ctx) {
			debug.SetGCPercent(50)
			debug.FreeOSMemory()
		}
	})
	signals := make(chan os.Signal, 4)
	signal.Notify(signals, unix.SIGTERM, unix.SIGINT)
	o := order{patience: 15 * time.Second}
	select {
	case o = <-m.orders:
	case <-signals:
	}
	m.setState(vmwire.StateStopping)
	m.stopEngine(o.patience)
	stopEngine()
	<-engineDone
	// All others are in this process' namespace, and have had their time.
	_ = unix.Kill(-1, unix.SIGTERM)
	time.Sleep(200 * time.Millisecond)
	_ = unix.Kill(-1, unix.SIGKILL)
	stop()
	m.table.Drain(2 * time.Second)
	unix.Sync()
	parts.Wait()
}

// laterInDistribution mounts the rest.
func (m *machine) laterInDistribution() {
	const plain = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	for _, d := range []string{"/dev/pts", "/dev/shm", "/dev/mqueue"} {
		if err := os.Mkdir(d, 0o755); err != nil && !errors.Is(err, fs.ErrExist) {
			m.problem(err)
		}
	}
	for _, x := range []mount{
		{"tmpfs", "/tmp", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=1777"},
		{"devpts", "/dev/pts", "devpts", unix.MS_NOSUID | unix.MS_NOEXEC, "newinstance,gid=5,mode=620,ptmxmode=666"},
		{"tmpfs", "/dev/shm", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=1777"},
		{"mqueue", "/dev/mqueue", "mqueue", plain, ""},
		{"bpf", "/sys/fs/bpf", "bpf", plain, "mode=700"},
	} {
		if err := unix.Mount(x.source, x.target, x.kind, x.flags, x.options); err != nil {
			m.log.Printf("cannot mount %s: %v", x.target, err) // a kernel may lack one
		}
	}
	id := "uninitialized\n"
	if b, err := os.ReadFile("/proc/sys/kernel/random/boot_id"); err == nil {
		m.mu.Lock()
		m.bootID = strings.TrimSpace(string(b))
		id = strings.ReplaceAll(m.bootID, "-", "") + "\n"
		m.mu.Unlock()
	}
	if err := os.WriteFile(filepath.Join(etc, "machine-id"), []byte(id), 0o644); err != nil {
		m.problem(err)
	}
}

// configureDistribution finds the machine's configuration: what the API kept, or what the image has. No cloud is asked:
// the computer's firmware says nothing of a distribution.
func (m *machine) configureDistribution(ctx context.Context) (*config.Document, error) {
	p := source.Places{Disk: configFile, Image: config.InImage, Log: m.log.Printf}
	f, err := p.Find(ctx)
	m.mu.Lock()
	m.configSource = f.Source
	if f.Source == "" {
		m.configSource = "default"
	}
	m.mu.Unlock()
	if err != nil || len(f.Document) == 0 {
		return new(config.Document), err
	}
	doc, err := config.Parse(f.Document)
	if err != nil {
		return new(config.Document), fmt.Errorf("cannot use the configuration (from %s): %w", f.Source, err)
	}
	m.mu.Lock()
	m.document, m.host = f.Document, doc.Hostname
	m.mu.Unlock()
	return doc, nil
}

// tuneDistribution sets what containers need of the kernel and raises what is lower: the kernel is that of all the
// user's distributions.
func (m *machine) tuneDistribution(configured map[string]string) {
	for key, least := range map[string]int64{
		"vm/max_map_count":              262144,
		"fs/inotify/max_user_watches":   1048576,
		"fs/inotify/max_user_instances": 8192,
		"net/core/somaxconn":            4096,
		"net/ipv4/ip_forward":           1,
	} {
		b, err := os.ReadFile("/proc/sys/" + key)
		if err != nil {
			m.log.Printf("%v", err)
			continue
		}
		if have, err := strconv.ParseInt(strings.TrimSpace(string(b)), 10, 64); err == nil && have >= least {
			continue
		}
		sysctls(map[string]string{key: strconv.FormatInt(least, 10)}, func(err error) { m.log.Printf("%v", err) })
	}
	sysctls(configured, m.problem)
}
