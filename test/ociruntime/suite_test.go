package ociruntime

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The outside suites, as the module proxy has them.
const (
	runcModule       = "github.com/opencontainers/runc@v1.5.2"
	validationModule = "github.com/opencontainers/runtime-tools@v0.9.1-0.20251114084447-edf4cb3d2116"
)

// unlike lists cases that runc passes and servin-runtime does not mean to.
var unlike = []string{
	// The root is entered by pivot_root or not at all.
	"runc run --no-pivot must not expose bare /proc",
}

// fetch copies a module to where it can be built.
func fetch(t *testing.T, module, dir string) {
	t.Helper()
	cmd := exec.Command("go", "mod", "download", "-json", module)
	cmd.Dir = t.TempDir()
	out, err := cmd.Output()
	var m struct{ Dir, Error string }
	if err != nil || json.Unmarshal(out, &m) != nil || m.Dir == "" {
		t.Skipf("SKIP: cannot have %s: %v %s", module, err, m.Error)
	}
	if out, err := exec.Command("sh", "-c", `mkdir -p "$2" && cp -r "$1/." "$2" && chmod -R u+w "$2" && find "$2" -name "*.sh" -exec chmod +x {} +`, "sh", m.Dir, dir).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
}

func build(t *testing.T, dir, cgo, out, pkg string, flags ...string) error {
	t.Helper()
	cmd := exec.Command("go", append(append([]string{"build", "-mod=mod"}, flags...), "-o", out, pkg)...)
	cmd.Dir = dir
	cmd.Env = append(os.Environ(), "CGO_ENABLED="+cgo, "GOFLAGS=")
	if text, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("%w: %s", err, text)
	}
	return nil
}

// newestRunc builds the runc to compare with.
func newestRunc(t *testing.T, src string) string {
	t.Helper()
	if p := filepath.Join(os.Getenv("SERVIN_BENCH_PEERS"), "runc"); filepath.IsAbs(p) {
		if _, err := os.Stat(p); err == nil {
			return p
		}
	}
	p := filepath.Join(src, "runc-bin")
	if err := build(t, src, "1", p, ".", "-tags", "seccomp"); err != nil {
		t.Skipf("SKIP: runc cannot be built: %v", err)
	}
	return p
}

var tapLine = regexp.MustCompile(`(?m)^(ok|not ok) \d+ -? ?(.*?)(?: in \d+ms)?( # skip.*)?$`)

// passed reads TAP and lists the cases that passed, with how often, and all.
func passed(tap string) (ok map[string]int, all int) {
	ok = map[string]int{}
	for _, m := range tapLine.FindAllStringSubmatch(strings.ReplaceAll(tap, "\r", ""), -1) {
		all++
		if m[1] == "ok" && m[3] == "" {
			ok[m[2]]++
		}
	}
	return ok, all
}

// compare reports what runc passes more often.
func compare(t *testing.T, name, theirs string, run func() string) {
	t.Helper()
	want, all := passed(theirs)
	ours := run()
	got, _ := passed(ours)
	// Some cases wait for a fixed time: what fails is tried again, as it may by itself.
	for again := 0; again < 2 && lacks(want, got) != ""; again++ {
		ours = run()
		more, _ := passed(ours)
		for c, n := range more {
			got[c] = max(got[c], n)
		}
	}
	t.Logf("%s: %d cases, runc passes %d, servin-runtime %d", name, all, total(want), total(got))
	for c, n := range want {
		if got[c] < n && !slices.Contains(unlike, c) {
			t.Errorf("%s: runc passes %q, servin-runtime does not:\n%s", name, c, around(ours, c))
		}
	}
}

// lacks names a case that is passed less often than it should be.
func lacks(want, got map[string]int) string {
	for c, n := range want {
		if got[c] < n && !slices.Contains(unlike, c) {
			return c
		}
	}
	return ""
}

func total(m map[string]int) (n int) {
	for _, v := range m {
		n += v
	}
	return n
}

func around(tap, c string) string {
	i := strings.Index(tap, c)
	if i < 0 {
		return tap[max(0, len(tap)-2000):]
	}
	return tap[i:min(len(tap), i+2000)]
}

// TestValidation runs the Open Container Initiative's validation programs.
func TestValidation(t *testing.T) {
	needLong(t)
	rt := program(t)
	dir := shortDir(t)
	fetch(t, validationModule, dir)
	fetch(t, runcModule, filepath.Join(dir, "runc"))
	runc := newestRunc(t, filepath.Join(dir, "runc"))
	if err := build(t, dir, "0", "runtimetest", "./cmd/runtimetest"); err != nil {
		t.Fatal(err)
	}
	cases, err := filepath.Glob(filepath.Join(dir, "validation/*/*.go"))
	if err != nil || len(cases) == 0 {
		t.Fatal("there are no validation programs")
	}
	for _, c := range cases {
		name := filepath.Base(filepath.Dir(c))
		if name == "util" {
			continue
		}
		t.Run(name, func(t *testing.T) {
			bin := strings.TrimSuffix(c, ".go") + ".t"
			if err := build(t, dir, "0", bin, "./"+filepath.Join("validation", name)); err != nil {
				t.Fatal(err)
			}
			run := func(runtime string) string {
				ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
				defer cancel()
				cmd := exec.CommandContext(ctx, bin)
				cmd.Dir, cmd.Env = dir, append(os.Environ(), "RUNTIME="+runtime)
				out, err := cmd.CombinedOutput()
				if err == nil {
					out = append(out, "\nok 1 - exit\n"...)
				}
				return string(out)
			}
			compare(t, name, run(runc), func() string { return run(rt) })
		})
	}
}

// TestBats runs runc's own suite. Its cases look for the name runc.
func TestBats(t *testing.T) {
	needLong(t)
	rt := program(t)
	need(t, "bats", "jq", "gawk", "script", "debootstrap")
	dir := shortDir(t)
	src := filepath.Join(dir, "src")
	fetch(t, runcModule, src)
	runc := newestRunc(t, src)
	for _, p := range []string{"recvtty", "sd-helper", "seccompagent", "fs-idmap", "pidfd-kill", "remap-rootfs", "key_label"} {
		if err := build(t, src, "1", filepath.Join(src, "tests/cmd/_bin", p), "./tests/cmd/"+p, "-tags", "seccomp"); err != nil {
			t.Skipf("SKIP: the suite's programs cannot be built: %v", err)
		}
	}
	images(t, dir, filepath.Join(src, "tests/integration/testdata"))
	ours := filepath.Join(dir, "bin/runc")
	if err := os.MkdirAll(filepath.Dir(ours), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(rt, ours); err != nil {
		t.Fatal(err)
	}
	// The suite leaves a configuration of CRIU behind.
	const criuConf = "/etc/criu/default.conf"
	if _, err := os.Stat(criuConf); errors.Is(err, os.ErrNotExist) {
		t.Cleanup(func() { _ = os.Remove(criuConf) })
	}
	files, _ := filepath.Glob(filepath.Join(src, "tests/integration/*.bats"))
	for _, f := range files {
		name := filepath.Base(f)
		t.Run(name, func(t *testing.T) {
			compare(t, name, bats(t, f, runc), func() string { return bats(t, f, ours) })
		})
	}
}

// bats runs one file with a controlling terminal, which the suite expects.
func bats(t *testing.T, file, runtime string) string {
	t.Helper()
	ptmx, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer ptmx.Close()
	fd := int(ptmx.Fd())
	n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err == nil {
		err = unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0)
	}
	if err != nil {
		t.Fatal(err)
	}
	tty, err := os.OpenFile(fmt.Sprintf("/dev/pts/%d", n), os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer tty.Close()
	out, err := os.CreateTemp(t.TempDir(), "tap")
	if err != nil {
		t.Fatal(err)
	}
	defer out.Close()
	ctx, cancel := context.WithTimeout(context.Background(), 8*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, "bats", "-t", file)
	cmd.Dir = filepath.Dir(file)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = tty, out, out
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true, Setctty: true, Ctty: 0}
	cmd.Env = append(os.Environ(), "RUNC="+runtime, "TMPDIR="+shortDir(t))
	cmd.WaitDelay = 5 * time.Second
	_ = cmd.Run() // failures are in what it says
	data, err := os.ReadFile(out.Name())
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// images makes the two root file systems that the suite would download.
func images(t *testing.T, dir, testdata string) {
	t.Helper()
	arch := "amd64"
	if out, err := exec.Command("go", "env", "GOARCH").Output(); err == nil {
		arch = strings.TrimSpace(string(out))
	}
	bb := filepath.Join(dir, "busybox")
	rootfs(t, bb)
	debian := filepath.Join(dir, "debian")
	for _, c := range [][]string{
		{"sh", "-c", `cd "$1" && rm -rf run && mkdir -p home usr/sbin usr/bin && chmod 1777 tmp && chmod 700 root && cd bin && for a in $(./busybox --list); do [ $a = busybox ] || ln -f busybox $a; done`, "sh", bb},
		{"tar", "-C", bb, "-cf", filepath.Join(testdata, "busybox-"+arch+".tar.xz"), "."},
		// Packages come over the network that we have left (TestMain).
		{"nsenter", "--net=/proc/" + strconv.Itoa(os.Getppid()) + "/ns/net", "debootstrap", "--variant=minbase", "--include=bash,util-linux,attr,acl", "bookworm", debian, "http://deb.debian.org/debian"},
		{"tar", "-C", debian, "-cf", filepath.Join(testdata, "debian-"+arch+".tar.xz"), "--exclude=./var/cache/apt/*", "--exclude=./var/lib/apt/lists", "."},
	} {
		if out, err := exec.Command(c[0], c[1:]...).CombinedOutput(); err != nil {
			if c[0] == "nsenter" {
				t.Skipf("SKIP: no Debian to be had: %v: %s", err, out[max(0, len(out)-300):])
			}
			t.Fatalf("%v: %v: %s", c, err, out)
		}
	}
}
