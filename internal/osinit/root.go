package osinit

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"runtime/debug"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/osinit/data"
	"github.com/cloudos-io/cloudos/internal/osinit/dm"
	"github.com/cloudos-io/cloudos/internal/osinit/modules"
	"github.com/cloudos-io/cloudos/internal/vmwire"
)

// etc holds the files of /etc that are made at each start.
const etc = "/run/cloudos/etc"

type mount struct {
	source, target, kind string
	flags                uintptr
	options              string
}

// early mounts what everything needs and opens the console.
func (m *machine) early() {
	for _, x := range []mount{
		{"proc", "/proc", "proc", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
		{"sysfs", "/sys", "sysfs", unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, ""},
		{"devtmpfs", "/dev", "devtmpfs", unix.MS_NOSUID, "mode=755"},
	} {
		if err := unix.Mount(x.source, x.target, x.kind, x.flags, x.options); err != nil && !errors.Is(err, unix.EBUSY) {
			m.problem(fmt.Errorf("cannot mount %s: %w", x.target, err))
		}
	}
	if f, err := os.OpenFile("/dev/console", os.O_WRONLY|unix.O_NOCTTY, 0); err == nil {
		m.log.console = f
	}
	b, err := os.ReadFile("/proc/cmdline")
	if err != nil {
		m.problem(err)
	}
	m.cmdline = parseCommandLine(string(b))
}

// settleKernel has the kernel patch its allocators now, for the memory controller that the engine
// uses, while next to nothing else runs: QEMU before 8.1 can lose a processor that runs through
// code while it is patched (ADR 56). Nothing depends on it. In VM mode shim/first.c did it.
func settleKernel() {
	const place = "/run" // of the initial file system, where nothing is
	if unix.Mount("cgroup2", place, "cgroup2", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "") != nil {
		return
	}
	group := filepath.Join(place, "first")
	if os.WriteFile(filepath.Join(place, "cgroup.subtree_control"), []byte("+memory"), 0) == nil && os.Mkdir(group, 0o755) == nil {
		_ = os.Remove(group)
	}
	_ = unix.Unmount(place, unix.MNT_DETACH)
}

// parseCommandLine returns the words of ours, "cloudos.KEY=VALUE".
func parseCommandLine(s string) map[string]string {
	out := map[string]string{}
	for _, w := range strings.Fields(s) {
		if k, v, _ := strings.Cut(w, "="); strings.HasPrefix(k, "cloudos.") {
			out[strings.TrimPrefix(k, "cloudos.")] = v
		}
	}
	return out
}

// patience with disks: some controllers take their time.
const patience = 30 * time.Second

// findRoot mounts the read-only root and makes it the machine's.
func (m *machine) findRoot(set *modules.Set) error {
	spec := m.cmdline["root"]
	if spec == "" { // VM mode's is found by shim/first.c, and nobody else's has a name that is sure
		return errors.New("cannot find the root: the command line does not say where it is (cloudos.root=)")
	}
	if err := set.LoadAll("virtio_pci", "virtio_blk", "squashfs"); err != nil {
		m.problem(err)
	}
	var check dm.Verity
	var err error
	if word := m.cmdline["verity"]; word != "" {
		if check, err = dm.ParseVerity(word); err != nil {
			return err
		}
	}
	var source string
	if kind, _, _ := strings.Cut(spec, "="); kind == "verity" || kind == "partlabel" {
		m.findESP(set)
	}
	if spec == "verity" {
		source, err = m.slotOfRoot(set, check)
	} else {
		source, err = m.rootSource(set, spec, check)
	}
	if err == nil && check.Blocks > 0 {
		source, err = m.checkedRoot(set, check, source)
	}
	if err != nil {
		return err
	}
	const place = "/new"
	if err := unix.Mount("root", place, "tmpfs", unix.MS_NODEV|unix.MS_NOATIME, "mode=755,size=16m"); err != nil {
		return fmt.Errorf("cannot mount the root: %w", err)
	}
	for _, d := range []string{"system", "proc", "sys", "dev"} {
		if err := os.Mkdir(filepath.Join(place, d), 0o755); err != nil {
			return err
		}
	}
	if err := unix.Mount(source, filepath.Join(place, "system"), "squashfs", unix.MS_RDONLY|unix.MS_NODEV, ""); err != nil {
		return fmt.Errorf("cannot mount the root from %s: %w", source, err)
	}
	for _, d := range []string{"/proc", "/sys", "/dev"} { // what the root is on stays where it is, unseen
		if err := unix.Mount(d, place+d, "", unix.MS_MOVE, ""); err != nil {
			return fmt.Errorf("cannot move %s: %w", d, err)
		}
	}
	// What the kernel unpacked stays open: modules are loaded from there beside all else.
	m.unpacked, err = os.OpenRoot("/")
	if err != nil {
		return err
	}
	if err := unix.Chdir(place); err != nil {
		return err
	}
	if err := unix.Mount(".", "/", "", unix.MS_MOVE, ""); err != nil {
		return fmt.Errorf("cannot make the root the machine's: %w", err)
	}
	if err := unix.Chroot("."); err != nil {
		return err
	}
	return unix.Chdir("/")
}

// layRoot makes what else the root has: folders, and links to what is in /system.
func layRoot(place string) error {
	for _, d := range []string{"run", "tmp", "var", "home", "mnt", "media", "opt", "srv"} {
		if err := os.Mkdir(filepath.Join(place, d), 0o755); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
	}
	for link, to := range map[string]string{
		"bin": "system/bin", "etc": "system/etc", "lib": "system/lib", "sbin": "bin", "usr": "system", "root": "var/root",
	} {
		if err := os.Symlink(to, filepath.Join(place, link)); err != nil {
			return err
		}
	}
	return nil
}

// rootSource finds the device with the root: a disk or partition, the file
// cloudos/root.img on an ISO volume, or /root.img of the initial file system.
func (m *machine) rootSource(set *modules.Set, spec string, check dm.Verity) (string, error) {
	kind, name, _ := strings.Cut(spec, "=")
	if kind == "initrd" {
		if err := set.LoadAll("loop"); err != nil {
			return "", err
		}
		return data.Loop("/root.img")
	}
	find := func() (string, bool) {
		if kind == "iso" {
			return data.FindISO(name)
		}
		if kind == "partlabel" {
			return m.rootOn(name, check)
		}
		dev, ok := data.Find(spec)
		return dev.Path, ok
	}
	begin := time.Now()
	for {
		if path, ok := find(); ok {
			if kind != "iso" {
				return path, nil
			}
			if err := set.LoadAll("isofs", "loop"); err != nil {
				return "", err
			}
			if err := os.MkdirAll("/medium", 0o755); err != nil {
				return "", err
			}
			if err := unix.Mount(path, "/medium", "iso9660", unix.MS_RDONLY|unix.MS_NODEV, ""); err != nil {
				return "", fmt.Errorf("cannot mount the medium %s: %w", path, err)
			}
			return data.Loop("/medium/cloudos/root.img")
		}
		if time.Since(begin) > patience {
			err := fmt.Errorf("no disk with the root (%s) came within %v", spec, patience)
			if kind == "partlabel" {
				_, why := m.startDisk(name)
				err = errors.Join(err, why)
			}
			return "", err
		}
		// Drivers of what else there is: controllers bring disks, hubs bring sticks.
		if err := set.Devices(); err != nil {
			m.log.Printf("%v", err)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// later mounts the rest, in the root.
func (m *machine) later() {
	os.MkdirAll("/dev/pts", 0o755)
	os.MkdirAll("/dev/shm", 0o1777)
	os.MkdirAll("/dev/mqueue", 0o755)
	const plain = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	for _, x := range []mount{
		{"tmpfs", "/run", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=755"},
		{"tmpfs", "/tmp", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=1777"},
		{"cgroup2", "/sys/fs/cgroup", "cgroup2", plain, "nsdelegate,memory_recursiveprot"},
		{"devpts", "/dev/pts", "devpts", unix.MS_NOSUID | unix.MS_NOEXEC, "gid=5,mode=620,ptmxmode=666"},
		{"tmpfs", "/dev/shm", "tmpfs", unix.MS_NOSUID | unix.MS_NODEV, "mode=1777"},
		{"mqueue", "/dev/mqueue", "mqueue", plain, ""},
		{"securityfs", "/sys/kernel/security", "securityfs", plain, ""},
		{"bpf", "/sys/fs/bpf", "bpf", plain, "mode=700"},
	} {
		if err := unix.Mount(x.source, x.target, x.kind, x.flags, x.options); err != nil {
			m.log.Printf("cannot mount %s: %v", x.target, err)
		}
	}
	for link, to := range map[string]string{"/dev/fd": "/proc/self/fd", "/dev/stdin": "/proc/self/fd/0", "/dev/stdout": "/proc/self/fd/1", "/dev/stderr": "/proc/self/fd/2"} {
		os.Symlink(to, link)
	}
	if err := os.MkdirAll(etc, 0o755); err != nil {
		m.problem(err)
	}
	id := "uninitialized\n"
	if b, err := os.ReadFile("/proc/sys/kernel/random/boot_id"); err == nil {
		m.bootID = strings.TrimSpace(string(b))
		id = strings.ReplaceAll(m.bootID, "-", "") + "\n"
	}
	for name, text := range map[string]string{
		"machine-id": id, "resolv.conf": "",
	} {
		if err := os.WriteFile(filepath.Join(etc, name), []byte(text), 0o644); err != nil {
			m.problem(err)
		}
	}
	sysctls(map[string]string{"kernel/modprobe": "/bin/cloudos-modprobe"}, m.problem)
}

// tune sets the kernel's parameters, those of the configuration last: before a container can
// be started.
func (m *machine) tune(configured map[string]string) {
	sysctls(map[string]string{
		"kernel/panic":                  "10",
		"kernel/kptr_restrict":          "2",
		"kernel/dmesg_restrict":         "1",
		"kernel/sysrq":                  "0",
		"kernel/core_pattern":           "|/bin/false",
		"kernel/pid_max":                "4194304",
		"vm/overcommit_memory":          "1",
		"vm/max_map_count":              "1048576",
		"fs/inotify/max_user_watches":   "1048576",
		"fs/inotify/max_user_instances": "8192",
		"fs/protected_hardlinks":        "1",
		"fs/protected_symlinks":         "1",
		"net/ipv4/ip_forward":           "1",
		"net/core/somaxconn":            "4096",
	}, func(err error) { m.log.Printf("%v", err) }) // a kernel may lack one
	sysctls(configured, m.problem)
}

func sysctls(values map[string]string, failed func(error)) {
	for key, value := range values {
		if err := os.WriteFile("/proc/sys/"+sysctlPath(key), []byte(value), 0); err != nil {
			failed(fmt.Errorf("cannot set %s: %w", strings.ReplaceAll(key, "/", "."), err))
		}
	}
}

// minFree is how many kibibytes the kernel keeps free for itself: what it would by itself
// without huge pages, for which it keeps many times as much.
func minFree() uint64 {
	var s unix.Sysinfo_t
	if unix.Sysinfo(&s) != nil {
		return 16 << 10
	}
	kib := float64(s.Totalram) * float64(s.Unit) / 1024
	return uint64(min(max(math.Sqrt(16*kib), 4<<10), 64<<10))
}

// mountData mounts what is kept at /var. Where that fails it is memory, and the
// error a reason for safe mode: nothing that is to be kept may go there.
func (m *machine) mountData(ctx context.Context) error {
	var failed error
	spec := m.cmdline["data"]
	if spec == "" {
		spec = "serial=" + vmwire.SerialData
	}
	dev, ok, err := m.dataDevice(spec)
	if !ok && err == nil && spec != "none" {
		time.Sleep(50 * time.Millisecond)
		dev, ok, err = m.dataDevice(spec)
	}
	if err != nil {
		failed = err
	} else if ok {
		if dev, err = m.openData(ctx, dev); err == nil {
			err = dev.Mount("/var")
		}
		if err == nil {
			m.mu.Lock()
			m.data, m.dataKind = dev, "disk"
			m.mu.Unlock()
		} else {
			failed = err
			ok = false
		}
	} else if spec != "none" {
		m.log.Printf("there is no data disk (%s): what is kept is in memory and gone with the machine", spec)
	}
	if !ok {
		if err := unix.Mount("var", "/var", "tmpfs", unix.MS_NODEV, "mode=755"); err != nil {
			m.problem(err)
		}
	}
	m.dataFolders()
	return failed
}

// dataFolders makes the folders of what is kept.
func (m *machine) dataFolders() {
	for _, d := range []string{"/var/lib", "/var/lib/servin", "/var/lib/cloudos", "/var/log", "/var/root", "/var/tmp"} {
		perm := os.FileMode(0o755)
		if d == "/var/root" || d == "/var/lib/cloudos" {
			perm = 0o700
		}
		if err := os.Mkdir(d, perm); err != nil && !errors.Is(err, os.ErrExist) {
			m.problem(err)
		}
	}
	os.Chmod("/var/tmp", 0o1777|os.ModeSticky)
	os.Symlink("/run", "/var/run")
}

// growAtStart gives the file system what the disk has more than it.
func (m *machine) growAtStart() {
	m.mu.Lock()
	dev, kind := m.data, m.dataKind
	m.mu.Unlock()
	if kind != "disk" {
		return
	}
	if err := dev.GrowPartition(); err != nil {
		m.problem(err)
	}
	if _, err := dev.Grow("/var"); err != nil {
		m.problem(err)
	}
	m.change()
}

// What the engine uses while it starts.
var engineModules = []string{"overlay"}

// What networks are made of: the kernel would otherwise run a program for each, several
// times. They are two thirds of what is loaded, and each byte of a module is hashed for its
// signature: the engine is to answer first.
var networkModules = []string{"bridge", "veth", "nf_tables", "nft_chain_nat", "nft_nat", "nft_ct", "nft_masq",
	"nft_fib", "nft_fib_ipv4", "nft_fib_ipv6", "nft_fib_inet", "nft_dup_ipv4", "nft_dup_ipv6"}

func (m *machine) loadNetworkModules() {
	if err := m.modules.LoadAll(networkModules...); err != nil {
		m.problem(err)
	}
}

// loadBeside begins to load what the data disk and the engine will need, one after the
// other, where the initial file system has it: the disks are more urgent.
func (m *machine) loadBeside() {
	m.beside.Go(func() {
		if err := m.initial.Load("quota_v2"); err != nil {
			m.problem(err)
		}
		close(m.quotas)
		for _, name := range engineModules {
			if err := m.initial.Load(name); err != nil {
				m.problem(err)
			}
		}
	})
}

// preload waits for what the engine is about to use, and loads what of it the initial
// file system did not have.
func (m *machine) preload() {
	m.beside.Wait()
	m.mark("early modules")
	for _, name := range engineModules {
		if m.initial.Has(name) {
			continue
		}
		if err := m.modules.Load(name); err != nil {
			m.problem(err)
		}
	}
}

// connect loads what the host and the network are met with. Nobody needs the initial file
// system then: what the kernel unpacked is memory, and given back.
func (m *machine) connect() {
	err := m.initial.LoadAll("virtio_console", "virtio_net")
	m.beside.Wait()
	m.initial.Close()
	for _, d := range []string{"init", "first", "lib"} {
		if err := m.unpacked.RemoveAll(d); err != nil {
			m.log.Printf("cannot give back the initial file system: %v", err)
		}
	}
	m.unpacked.Close()
	if err := errors.Join(err, m.modules.LoadAll("virtio_console", "virtio_net")); err != nil {
		m.problem(err)
	}
	m.come.notify()
}

// awaitReady waits until the engine answers, or has had its time; it returns false when ctx is done.
func (m *machine) awaitReady(ctx context.Context) bool {
	select {
	case <-m.ready:
	case <-ctx.Done():
		return false
	case <-time.After(20 * time.Second):
	}
	return true
}

// hostPatience is how long containers are not started again for a host that does not come: as long as it
// waits for the machine.
const hostPatience = 5 * time.Minute

// awaitHost waits, in VM mode, until the host has given what it shares: a container that is started again
// before would find an empty folder in its place, and write there.
func (m *machine) awaitHost(ctx context.Context) {
	if !m.virtual {
		return
	}
	select {
	case <-m.hosted:
	case <-ctx.Done():
	case <-time.After(hostPatience):
		m.log.Printf("the host did not come: containers are started again without what it shares")
	}
}

// settle loads the rest, once the engine answers.
func (m *machine) settle(ctx context.Context) {
	if !m.awaitReady(ctx) {
		return
	}
	debug.SetGCPercent(50)
	m.sparing()
	if m.cmdline["root"] == "" {
		// A virtual machine has all that it started for: the first commands go first.
		if err := m.modules.LoadAll("virtio_balloon", "virtio_rng"); err != nil {
			m.log.Printf("%v", err)
		}
		m.come.notify()
		select {
		case <-ctx.Done():
			return
		case <-time.After(3 * time.Second):
		}
	}
	if err := m.modules.LoadAll("br_netfilter", "nft_reject_inet", "nft_redir", "nft_log", "nft_limit", "nft_numgen", "nft_objref", "nft_quota",
		"nft_tproxy", "nft_socket", "virtio_balloon", "virtio_rng", "tun", "dummy", "loop"); err != nil {
		m.log.Printf("%v", err)
	}
	if err := m.modules.Devices(); err != nil {
		m.log.Printf("%v", err)
	}
	m.come.notify()
	debug.FreeOSMemory() // what the start left
}

// sparing makes the kernel keep less memory to itself. Not at once: a start is quicker
// with huge pages.
func (m *machine) sparing() {
	// Programs that gain from huge pages ask for them; to all others they are memory
	// that is never used. First, since it raises what is kept free.
	if err := os.WriteFile("/sys/kernel/mm/transparent_hugepage/enabled", []byte("madvise"), 0); err != nil {
		m.log.Printf("cannot choose who gets huge pages: %v", err)
	}
	if err := os.WriteFile("/proc/sys/vm/min_free_kbytes", []byte(strconv.FormatUint(minFree(), 10)), 0); err != nil {
		m.log.Printf("cannot set vm.min_free_kbytes: %v", err)
	}
}

// down unmounts everything that can be.
func (m *machine) down() {
	unix.Sync()
	// Whatever still runs has had its time.
	unix.Kill(-1, unix.SIGTERM)
	time.Sleep(200 * time.Millisecond)
	unix.Kill(-1, unix.SIGKILL)
	m.table.Drain(2 * time.Second)
	b, err := os.ReadFile("/proc/self/mounts")
	if err != nil {
		m.log.Printf("cannot list mounts: %v", err)
	}
	lines := strings.Split(strings.TrimSpace(string(b)), "\n")
	for i := len(lines) - 1; i >= 0; i-- {
		f := strings.Fields(lines[i])
		if len(f) < 3 {
			continue
		}
		target := strings.NewReplacer(`\040`, " ", `\011`, "\t", `\134`, `\`).Replace(f[1])
		switch {
		case strings.HasPrefix(target, "/var"), f[2] == "virtiofs":
			if err := unix.Unmount(target, 0); err != nil {
				unix.Unmount(target, unix.MNT_DETACH)
			}
		}
	}
	// A file system that is still in use is at least read-only and whole.
	unix.Mount("", "/var", "", unix.MS_REMOUNT|unix.MS_RDONLY, "")
	unix.Sync()
}
