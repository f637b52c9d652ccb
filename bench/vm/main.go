// Command vm measures VM mode: how long a machine takes until its engine answers
// beside the same kernel, QEMU and devices with a busybox init; to the first container's output; what
// an idle machine takes; how soon memory comes back; what a shared folder costs; and how large images are.
//
// usage: go run ./bench/vm -bin bin -image DIR [-n 10] [-out bench/results/vm.md]
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/cloudos-io/cloudos/api"
)

type bench struct {
	ctx             context.Context
	bin, image, dir string
	n               int
	out             strings.Builder
}

func main() {
	b := &bench{}
	flag.StringVar(&b.bin, "bin", "bin", "folder with the programs")
	flag.StringVar(&b.image, "image", "", "folder of the image (default: one is built)")
	flag.IntVar(&b.n, "n", 10, "alternations")
	out := flag.String("out", "bench/results/vm.md", "file for the results")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	b.ctx = ctx
	if err := b.run(*out); err != nil {
		fmt.Fprintln(os.Stderr, "bench/vm:", err)
		os.Exit(1)
	}
}

func (b *bench) run(out string) (err error) {
	if b.bin, err = filepath.Abs(b.bin); err != nil {
		return err
	}
	if b.dir, err = os.MkdirTemp("", "bvm"); err != nil {
		return err
	}
	defer os.RemoveAll(b.dir)
	if b.image == "" {
		b.image = filepath.Join(b.dir, "image")
		if o, err := exec.CommandContext(b.ctx, filepath.Join(b.bin, "cloudos"), "image", "build", "-q", "--format", "vm", "-o", b.image).CombinedOutput(); err != nil {
			return fmt.Errorf("cannot build the image: %w: %s", err, o)
		}
	}
	if b.image, err = filepath.Abs(b.image); err != nil {
		return err
	}
	home := filepath.Join(b.dir, "home")
	if err := os.Mkdir(home, 0o755); err != nil {
		return err
	}
	defer func() {
		b.servin("vm", "stop", "--force")
		b.quit()
	}()
	if _, err := b.servin("vm", "config", "--cpus", "2", "--memory", "2g", "--disk", "8g", "--idle-time", "0"); err != nil {
		return err
	}
	if err := b.table(home); err != nil {
		return err
	}
	if err := b.sizes(); err != nil {
		return err
	}
	fmt.Print(b.out.String())
	return os.WriteFile(out, []byte(b.out.String()), 0o644)
}

func (b *bench) env() []string {
	return append(os.Environ(), "SERVIN_VM_ROOT="+b.dir, "SERVIN_VM_IMAGE="+b.image, "HOME="+filepath.Join(b.dir, "home"),
		"SERVIN_CONFIG="+filepath.Join(b.dir, "config"), "SERVIN_CONTEXT=", "SERVIN_HOST=unix://"+filepath.Join(b.dir, "run", "vm.sock"))
}

func (b *bench) servin(args ...string) (string, error) {
	cmd := exec.CommandContext(b.ctx, filepath.Join(b.bin, "servin"), args...)
	cmd.Env = b.env()
	var said strings.Builder
	cmd.Stderr = &said
	out, err := cmd.Output()
	if err != nil {
		err = fmt.Errorf("servin %s: %w: %s", strings.Join(args, " "), err, said.String())
	}
	return string(out), err
}

func (b *bench) status() (st api.VMStatus, err error) {
	out, err := b.servin("vm", "status", "--json")
	if out != "" {
		err = json.Unmarshal([]byte(out), &st)
	}
	return st, err
}

// quit ends the servin-vmd that this benchmark had started.
func (b *bench) quit() {
	procs, _ := filepath.Glob("/proc/[0-9]*")
	for _, p := range procs {
		line, _ := os.ReadFile(p + "/cmdline")
		env, _ := os.ReadFile(p + "/environ")
		if strings.HasSuffix(strings.TrimRight(string(line), "\x00"), "servin-vmd") && strings.Contains(string(env), "SERVIN_VM_ROOT="+b.dir+"\x00") {
			if pid, err := strconv.Atoi(filepath.Base(p)); err == nil {
				syscall.Kill(pid, syscall.SIGTERM)
			}
		}
	}
}

func median(v []float64) float64 {
	v = slices.Sorted(slices.Values(v))
	if len(v) == 0 {
		return 0
	}
	return (v[(len(v)-1)/2] + v[len(v)/2]) / 2
}

func (b *bench) table(home string) error {
	// The first start makes the data disk and tries KVM: it is not counted.
	if _, err := b.servin("vm", "start"); err != nil {
		return err
	}
	st, err := b.status()
	if err != nil {
		return err
	}
	args, err := baseline(st.PID, b.dir, b.image)
	if err != nil {
		return err
	}
	var up, first, plain, inside []float64
	for range b.n {
		if _, err := b.servin("vm", "stop"); err != nil {
			return err
		}
		s, err := b.plain(args)
		if err != nil {
			return err
		}
		plain = append(plain, s)
		begin := time.Now()
		if _, err := b.servin("vm", "start"); err != nil {
			return err
		}
		up = append(up, time.Since(begin).Seconds())
		if out, err := b.servin("run", "--rm", "servin/hello", "echo", "x"); err != nil || out != "x\n" {
			return fmt.Errorf("%q %w", out, err)
		}
		first = append(first, time.Since(begin).Seconds())
		if st, err = b.status(); err != nil {
			return err
		}
		age, err := age(st.PID)
		if err != nil {
			return err
		}
		inside = append(inside, up[len(up)-1]-(time.Since(begin).Seconds()-age))
	}
	fmt.Fprintf(&b.out, "# VM mode\n\nKernel %s, %s, %s. Medians of %d, alternating, %d processors.\n\n| | | against | bar |\n|---|---|---|---|\n", st.Kernel, st.Driver, st.Accelerator, b.n, st.Config.CPUs)
	row := func(what, value, against, bar string) {
		fmt.Fprintf(&b.out, "| %s | %s | %s | %s |\n", what, value, against, bar)
	}
	base := median(plain)
	row("same QEMU, kernel and devices, to a busybox init's line", fmt.Sprintf("%.2f s", base), "", "")
	row("the same from the exec of QEMU to the engine answering", fmt.Sprintf("%.2f s", median(inside)), fmt.Sprintf("%.2f ×", median(inside)/base), "1.5 ×")
	row("`servin vm start`, to the engine answering", fmt.Sprintf("%.2f s", median(up)), fmt.Sprintf("%.2f ×", median(up)/base), "")
	row("`servin vm start`, to the first container's output", fmt.Sprintf("%.2f s", median(first)), fmt.Sprintf("%.2f ×", median(first)/base), "2 ×")

	time.Sleep(30 * time.Second) // idle is after what follows a start
	if st, err = b.status(); err != nil {
		return err
	}
	row("memory used in an idle guest", fmt.Sprintf("%d MiB", (st.Memory.Guest-st.Memory.Available)>>20), "", "120 MiB")
	row("memory that an idle machine takes of the host", fmt.Sprintf("%d MiB", st.Memory.Host>>20), "", "")
	if err := b.memory(row); err != nil {
		return err
	}
	return b.share(home, row)
}

// age is how long ago a process began, to a hundredth of a second.
func age(pid int) (float64, error) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return 0, err
	}
	up, err := os.ReadFile("/proc/uptime")
	if err != nil {
		return 0, err
	}
	fields := strings.Fields(string(stat[strings.LastIndexByte(string(stat), ')')+1:]))
	if len(fields) < 20 {
		return 0, errors.New("a process's status is cut short")
	}
	ticks, err := strconv.ParseFloat(fields[19], 64)
	if err != nil {
		return 0, err
	}
	var now float64
	if _, err := fmt.Sscan(string(up), &now); err != nil {
		return 0, err
	}
	return now - ticks/100, nil
}

// rootOf finds the root's disk, unpacked, among what a machine's process has open.
func rootOf(pid int) (string, error) {
	open, err := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid))
	if err != nil {
		return "", err
	}
	for _, fd := range open {
		to, err := os.Readlink(fd)
		if base := filepath.Base(to); err == nil && strings.HasPrefix(base, "root-") && strings.HasSuffix(base, ".img") {
			return to, nil
		}
	}
	return "", errors.New("the machine has no unpacked root open")
}

// baseline makes of the machine's own command line one with a busybox init, whose
// console is standard output and whose sockets lead nowhere.
func baseline(pid int, dir, image string) ([]string, error) {
	raw, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil {
		return nil, err
	}
	disk, err := rootOf(pid)
	if err != nil {
		return nil, err
	}
	root := filepath.Join(dir, "plain")
	if err := os.MkdirAll(filepath.Join(root, "bin"), 0o755); err != nil {
		return nil, err
	}
	busybox, err := os.ReadFile("/usr/bin/busybox")
	if err != nil {
		return nil, fmt.Errorf("%w: install busybox-static", err)
	}
	for path, b := range map[string][]byte{"bin/busybox": busybox,
		"init": []byte("#!/bin/busybox sh\n/bin/busybox mkdir -p /dev\n/bin/busybox mount -t devtmpfs dev /dev\nexec >/dev/console\necho PLAIN UP\nexec /bin/busybox sleep 1000\n")} {
		if err := os.WriteFile(filepath.Join(root, path), b, 0o755); err != nil {
			return nil, err
		}
	}
	initrd := filepath.Join(dir, "plain.initrd")
	if out, err := exec.Command("sh", "-c", `cd "$0" && find . | busybox cpio -o -H newc 2>/dev/null | gzip -1 > "$1"`, root, initrd).CombinedOutput(); err != nil {
		return nil, fmt.Errorf("%w: %s", err, out)
	}
	data := filepath.Join(dir, "plain.img")
	if err := os.WriteFile(data, nil, 0o600); err != nil {
		return nil, err
	}
	if err := os.Truncate(data, 1<<30); err != nil {
		return nil, err
	}
	in := strings.Split(strings.TrimRight(string(raw), "\x00"), "\x00")
	var out []string
	for i := 0; i < len(in); i++ {
		a := in[i]
		next := func() string { i++; return in[i] }
		switch a {
		case "-S":
		case "-add-fd", "-mon":
			next()
		case "-kernel":
			next()
			out = append(out, a, filepath.Join(image, "kernel"))
		case "-initrd":
			next()
			out = append(out, a, initrd)
		case "-append":
			next()
			out = append(out, a, "console=ttyS0 quiet loglevel=4 panic=10 random.trust_cpu=on")
		case "-chardev":
			v := next()
			switch {
			case strings.Contains(v, "id=console"):
				out = append(out, a, "stdio,id=console,signal=off")
			case strings.Contains(v, "id=port"):
				out = append(out, a, "null,id=port")
			}
		case "-device":
			if v := next(); !strings.HasPrefix(v, "vhost-user-fs") {
				out = append(out, a, v)
			}
		case "-blockdev":
			v := strings.ReplaceAll(next(), "/dev/fdset/1", disk)
			out = append(out, a, strings.ReplaceAll(v, "/dev/fdset/2", data))
		default:
			out = append(out, a)
		}
	}
	return out, nil
}

// plain runs it until its init's line.
func (b *bench) plain(args []string) (float64, error) {
	ctx, cancel := context.WithTimeout(b.ctx, 2*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, args[0], args[1:]...)
	var said strings.Builder
	cmd.Stderr = &said
	out, err := cmd.StdoutPipe()
	if err != nil {
		return 0, err
	}
	begin := time.Now()
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	defer func() { cmd.Process.Kill(); cmd.Wait() }()
	for lines := bufio.NewScanner(out); lines.Scan(); {
		if strings.Contains(lines.Text(), "PLAIN UP") {
			return time.Since(begin).Seconds(), nil
		}
	}
	return 0, errors.New("the plain machine did not come up: " + said.String())
}

// shell makes an image with a shell in the machine.
func (b *bench) shell() error {
	root := filepath.Join(b.dir, "plain")
	for _, a := range []string{"sh", "dd", "sleep", "rm", "sync"} {
		if err := os.Symlink("busybox", filepath.Join(root, "bin", a)); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
	}
	tar := filepath.Join(b.dir, "shell.tar")
	if out, err := exec.Command("tar", "-C", root, "-cf", tar, ".").CombinedOutput(); err != nil {
		return fmt.Errorf("%w: %s", err, out)
	}
	_, err := b.servin("import", tar, "shell:1")
	return err
}

func (b *bench) memory(row func(what, value, against, bar string)) error {
	if err := b.shell(); err != nil {
		return err
	}
	before, err := b.status()
	if err != nil {
		return err
	}
	if _, err := b.servin("run", "-d", "--name", "big", "--shm-size", "1100m", "shell:1", "sh", "-c", "dd if=/dev/zero of=/dev/shm/x bs=1M count=1024 2>/dev/null; echo full; sleep 1000"); err != nil {
		return err
	}
	for range 1200 {
		if out, _ := b.servin("logs", "big"); strings.Contains(out, "full") {
			break
		}
		time.Sleep(100 * time.Millisecond)
	}
	used, err := b.status()
	if err != nil {
		return err
	}
	if _, err := b.servin("rm", "-f", "big"); err != nil {
		return err
	}
	begin := time.Now()
	for time.Since(begin) < time.Minute {
		st, err := b.status()
		if err != nil {
			return err
		}
		// Nine tenths of what it had taken.
		if st.Memory.Host < used.Memory.Host-(used.Memory.Host-before.Memory.Host)*9/10 {
			row("memory of a container that used 1 GiB back on the host", fmt.Sprintf("%.1f s (%d → %d → %d MiB)", time.Since(begin).Seconds(), before.Memory.Host>>20, used.Memory.Host>>20, st.Memory.Host>>20), "", "15 s")
			return nil
		}
		time.Sleep(100 * time.Millisecond)
	}
	row("memory of a container that used 1 GiB back on the host", "not within a minute", "", "15 s")
	return nil
}

func (b *bench) share(home string, row func(what, value, against, bar string)) error {
	const mib = 64
	measure := func(run func(script string) error, dir string) (write, read float64, err error) {
		begin := time.Now()
		if err = run(fmt.Sprintf("dd if=/dev/zero of=%s/x bs=1M count=%d conv=fsync 2>/dev/null", dir, mib)); err != nil {
			return
		}
		write = mib / time.Since(begin).Seconds()
		begin = time.Now()
		err = run(fmt.Sprintf("dd if=%s/x of=/dev/null bs=1M 2>/dev/null; rm %s/x", dir, dir))
		return write, mib / time.Since(begin).Seconds(), err
	}
	inside := func(script string) error {
		_, err := b.servin("exec", "io", "sh", "-c", script)
		return err
	}
	if _, err := b.servin("run", "-d", "--name", "io", "-v", home+":"+home, "-v", "vol:/vol", "shell:1", "sleep", "1000"); err != nil {
		return err
	}
	sw, sr, err := measure(inside, home)
	if err != nil {
		return err
	}
	vw, vr, err := measure(inside, "/vol")
	if err != nil {
		return err
	}
	nw, nr, err := measure(func(script string) error { return exec.CommandContext(b.ctx, "busybox", "sh", "-c", script).Run() }, home)
	if err != nil {
		return err
	}
	row("write 64 MiB through a share", fmt.Sprintf("%.0f MiB/s", sw), fmt.Sprintf("native %.0f, a volume in the machine %.0f", nw, vw), "")
	row("read 64 MiB through a share", fmt.Sprintf("%.0f MiB/s", sr), fmt.Sprintf("native %.0f, a volume in the machine %.0f", nr, vr), "")
	return nil
}
