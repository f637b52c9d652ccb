package plan

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

// hostDir makes a directory of the host with a file in it, to be mounted.
func hostDir(t *testing.T) string {
	t.Helper()
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "f"), []byte("host\n"), 0o644); err != nil {
		t.Fatal(err)
	}
	return dir
}

func add(m ...specs.Mount) func(*specs.Spec, *Options) {
	return func(s *specs.Spec, _ *Options) { s.Mounts = append(s.Mounts, m...) }
}

func TestMounts(t *testing.T) {
	needStage(t)
	src := hostDir(t)
	sub := filepath.Join(src, "sub")
	if err := os.Mkdir(sub, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := unix.Mount("tmpfs", sub, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(sub, unix.MNT_DETACH) })
	link := func(target, name string) func(*specs.Spec) {
		return func(s *specs.Spec) {
			if err := os.Symlink(target, filepath.Join(s.Root.Path, name)); err != nil {
				t.Fatal(err)
			}
		}
	}
	for name, c := range map[string]struct {
		script, want string
		mount        specs.Mount
		change       func(*specs.Spec)
	}{
		"directory":      {"cat /a/b/c/f; touch /a/b/c/g && echo ok", "host\nok\n", specs.Mount{Destination: "/a/b/c", Source: src, Type: "bind", Options: []string{"rbind"}}, nil},
		"file":           {"cat /a/f", "host\n", specs.Mount{Destination: "/a/f", Source: src + "/f", Options: []string{"bind"}}, nil},
		"relative":       {"cat /a/f", "host\n", specs.Mount{Destination: "a", Source: src, Options: []string{"bind"}}, nil},
		"read-only":      {"touch /a/x || echo no; touch /a/sub/x && echo yes", "touch: /a/x: Read-only file system\nno\nyes\n", specs.Mount{Destination: "/a", Source: src, Options: []string{"rbind", "ro"}}, nil},
		"recursively so": {"touch /a/x || echo no; touch /a/sub/x || echo no", "touch: /a/x: Read-only file system\nno\ntouch: /a/sub/x: Read-only file system\nno\n", specs.Mount{Destination: "/a", Source: src, Options: []string{"rbind", "rro"}}, nil},
		"not recursive":  {"ls /a/sub", "", specs.Mount{Destination: "/a", Source: src, Options: []string{"bind"}}, nil},
		"tmpfs":          {"stat -c %a /t; grep ' /t ' /proc/self/mountinfo | grep -c size=1024k", "700\n1\n", specs.Mount{Destination: "/t", Type: "tmpfs", Options: []string{"mode=700", "size=1m", "noexec"}}, nil},
		"copy up": {"cat /etc/passwd | head -1; stat -c '%a %u' /etc/d /etc/d/e; readlink /etc/l; touch /etc/x && echo ok", "root:x:0:0::/root:/bin/sh\n751 12\n640 0\n/nowhere\nok\n", specs.Mount{Destination: "/etc", Type: "tmpfs", Options: []string{"tmpcopyup"}}, func(s *specs.Spec) {
			d := filepath.Join(s.Root.Path, "etc/d")
			os.Mkdir(d, 0o751)
			os.Chmod(d, 0o751)
			os.WriteFile(d+"/e", nil, 0o640)
			os.Chown(d, 12, 0)
			os.Symlink("/nowhere", filepath.Join(s.Root.Path, "etc/l"))
			os.Chmod(d+"/e", 0o640)
		}},
		"absolute symlink": {"cat /real/f; ls -d /host 2>/dev/null", "host\n", specs.Mount{Destination: "/link", Source: src, Options: []string{"bind"}}, link("/real", "link")},
		"dangling parent":  {"cat /run/x/f", "host\n", specs.Mount{Destination: "/var/x", Source: src, Options: []string{"bind"}}, link("../../../run", "var")},
		"escaping symlink": {"cat /tmp/f", "host\n", specs.Mount{Destination: "/up/tmp", Source: src, Options: []string{"bind"}}, link("../../../../../..", "up")},
		"shared":           {"grep ' /a ' /proc/self/mountinfo | grep -c shared:", "1\n", specs.Mount{Destination: "/a", Type: "tmpfs", Options: []string{"shared"}}, nil},
		"slave by default": {"grep ' /a ' /proc/self/mountinfo | grep -c shared:; true", "0\n", specs.Mount{Destination: "/a", Source: src, Options: []string{"rbind"}}, nil},
		"shared root": {"grep ' / / \\| / rw' /proc/self/mountinfo | head -1 | grep -c shared:", "1\n", specs.Mount{Destination: "/a", Type: "tmpfs"},
			func(s *specs.Spec) { s.Linux.RootfsPropagation = "rshared" }},
	} {
		t.Run(name, func(t *testing.T) {
			out, code := box(t, c.script, func(s *specs.Spec, o *Options) {
				add(c.mount)(s, o)
				if c.change != nil {
					c.change(s)
				}
			})
			if out != c.want {
				t.Fatalf("exit %d, got:\n%s\nwant:\n%s", code, out, c.want)
			}
		})
	}
}

func TestManySlots(t *testing.T) {
	src := hostDir(t)
	out, code := box(t, "cat /m/0/f /m/299/f; ls /m | grep -c .", func(s *specs.Spec, _ *Options) {
		for i := range 300 {
			s.Mounts = append(s.Mounts, specs.Mount{Destination: fmt.Sprintf("/m/%d", i), Source: src, Options: []string{"bind"}})
		}
	})
	if out != "host\nhost\n300\n" || code != 0 {
		t.Fatalf("exit %d: %s", code, out)
	}
}

// TestEscapes: images and specs that try to get at the host, or to write where
// they must not, fail to start.
func TestEscapes(t *testing.T) {
	needStage(t)
	src := hostDir(t)
	outside := t.TempDir()
	symlink := func(target, name string) func(*specs.Spec, *Options) {
		return func(s *specs.Spec, _ *Options) {
			p := filepath.Join(s.Root.Path, name)
			os.RemoveAll(p)
			if err := os.Symlink(target, p); err != nil {
				t.Fatal(err)
			}
		}
	}
	for name, c := range map[string]struct {
		want   error
		change func(*specs.Spec, *Options)
	}{
		// CVE-2019-19921, CVE-2023-27561: a mount of procfs diverted by a symlink
		"proc is a symlink": {unix.ELOOP, symlink("tmp", "proc")},
		"sys is a symlink":  {unix.ELOOP, symlink("/tmp", "sys")},
		// CVE-2019-16884: a volume over procfs, by way of a symlink
		"volume onto proc": {unix.EPERM, func(s *specs.Spec, o *Options) {
			symlink("/proc", "vol")(s, o)
			add(specs.Mount{Destination: "/vol/self", Source: src, Options: []string{"bind"}})(s, o)
		}},
		"file system onto proc": {unix.EPERM, func(s *specs.Spec, o *Options) {
			symlink("/proc/sys", "vol")(s, o)
			add(specs.Mount{Destination: "/vol", Type: "tmpfs"})(s, o)
		}},
		// CVE-2024-21626: a working directory by way of a leaked descriptor
		"directory by descriptor": {unix.ELOOP, func(s *specs.Spec, _ *Options) { s.Process.Cwd = "/proc/self/fd/3" }},
		"directory by root link":  {unix.ELOOP, func(s *specs.Spec, _ *Options) { s.Process.Cwd = "/proc/1/root/tmp" }},
		// CVE-2025-31133: something else where /dev/null is expected
		"null is a symlink": {unix.ENODEV, func(s *specs.Spec, o *Options) {
			s.Mounts = append(s.Mounts[:1], s.Mounts[2:]...) // no tmpfs on /dev
			for i := range s.Mounts {
				if s.Mounts[i].Destination == "/dev/pts" {
					s.Mounts = append(s.Mounts[:i], s.Mounts[i+1:]...)
					break
				}
			}
			s.Mounts = append(s.Mounts, specs.Mount{Destination: "/dev", Source: outside, Options: []string{"bind"}})
			os.WriteFile(filepath.Join(outside, "null"), nil, 0o644)
		}},
		"wrong device": {unix.EEXIST, func(s *specs.Spec, o *Options) {
			var keep []specs.Mount
			for _, m := range s.Mounts {
				if !strings.HasPrefix(m.Destination, "/dev") {
					keep = append(keep, m)
				}
			}
			s.Mounts = keep
			os.WriteFile(filepath.Join(s.Root.Path, "dev/null"), nil, 0o644)
		}},
		"endless symlinks": {unix.ELOOP, func(s *specs.Spec, o *Options) {
			symlink("loop", "loop")(s, o)
			add(specs.Mount{Destination: "/loop/x", Source: src, Options: []string{"bind"}})(s, o)
		}},
	} {
		t.Run(name, func(t *testing.T) {
			spec := defaultSpec(t, rootfs(t), "true")
			var o Options
			c.change(spec, &o)
			se, _ := fails(t, spec, o)
			if !errors.Is(se, c.want) {
				t.Fatalf("got %v, want %v", se, c.want)
			}
		})
	}
	if left, _ := os.ReadDir(outside); len(left) > 1 {
		t.Errorf("something was made outside: %v", left)
	}
}

// TestNoWayToTheStage: the process finds neither the stage's binary nor its
// memory, also where the reaper stays.
func TestNoWayToTheStage(t *testing.T) {
	out, _ := box(t, "readlink /proc/1/exe >/dev/null 2>&1 || echo hidden; cat /proc/1/environ 2>/dev/null; ls /proc/1/fd 2>/dev/null", func(s *specs.Spec, o *Options) {
		o.Init = true
	})
	if out != "hidden\n" {
		t.Fatalf("got %s", out)
	}
}

func TestConsoleSwap(t *testing.T) {
	needStage(t)
	// CVE-2025-52565: /dev/console is not what it should be
	outside := hostDir(t)
	spec := defaultSpec(t, rootfs(t), "true")
	spec.Process.Terminal = true
	for i := range spec.Mounts {
		if spec.Mounts[i].Destination == "/dev/pts" {
			spec.Mounts[i] = specs.Mount{Destination: "/dev/pts", Source: outside, Options: []string{"bind"}}
		}
	}
	unix.Mknod(filepath.Join(outside, "ptmx"), unix.S_IFCHR|0o666, int(unix.Mkdev(5, 2)))
	se, _ := fails(t, spec, Options{})
	if !errors.Is(se, unix.ENODEV) && !errors.Is(se, unix.ENOENT) {
		t.Fatalf("a terminal from elsewhere: %v", se)
	}
}
