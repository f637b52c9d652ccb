package plan

import (
	"encoding/json"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/cloudos-io/cloudos/internal/seccomp"
	specs "github.com/opencontainers/runtime-spec/specs-go"
)

// TestIsolationAgainstRunc runs one bundle under runc and under our plan and
// compares what a process in it sees of its confinement.
func TestIsolationAgainstRunc(t *testing.T) {
	needStage(t)
	runc, err := exec.LookPath("runc")
	if err != nil {
		t.Skip("SKIP: runc is not installed")
	}
	script := `echo == status; grep -e ^Uid -e ^Gid -e ^Groups -e ^Umask -e ^Cap -e ^NoNew -e ^Seccomp -e ^Sig /proc/self/status
echo == mounts; cat /proc/self/mountinfo
echo == dev; for f in /dev/* /dev/pts/*; do stat -c '%n %A %t:%T %u:%g' $f; readlink $f; done
echo == masked; for f in /proc/asound /proc/acpi /proc/interrupts /proc/kcore /proc/keys /proc/timer_list /proc/scsi /sys/firmware; do stat -c '%n %F' $f; cat $f; ls $f; done 2>&1
echo == written; for f in /proc/sys/kernel/msgmax /proc/sysrq-trigger /proc/irq/default_smp_affinity /sys/kernel/profiling /proc/self/oom_score_adj; do (echo 0 > $f) 2>/dev/null && echo $f written; done
echo == fds; ls /proc/self/fd; echo == misc; hostname; pwd; env; ulimit -n; cat /proc/self/oom_score_adj /proc/sys/net/ipv4/ip_unprivileged_port_start; echo $$
echo == net; ip addr`
	for name, change := range map[string]func(*specs.Spec){
		"default": func(*specs.Spec) {},
		"user, read-only, no new privileges": func(s *specs.Spec) {
			s.Process.User = specs.User{UID: 1000, GID: 1000, AdditionalGids: []uint32{5, 10}}
			s.Root.Readonly, s.Process.NoNewPrivileges, s.Process.Cwd = true, true, "/tmp"
			s.Process.OOMScoreAdj = ptr(50)
			s.Linux.Sysctl = map[string]string{"net.ipv4.ip_unprivileged_port_start": "99"}
			s.Process.Rlimits = []specs.POSIXRlimit{{Type: "RLIMIT_NOFILE", Soft: 100, Hard: 200}}
			s.Linux.Devices = []specs.LinuxDevice{{Path: "/dev/fuse", Type: "c", Major: 10, Minor: 229, FileMode: ptr(os.FileMode(0o666))}}
		},
	} {
		t.Run(name, func(t *testing.T) {
			root := rootfs(t)
			spec := defaultSpec(t, root, "sh", "-c", script)
			change(spec)
			// The hierarchies of this host are not what is compared, and runc is not
			// to touch them.
			spec.Mounts = slices.DeleteFunc(spec.Mounts, func(m specs.Mount) bool { return m.Type == "cgroup" })
			if spec.Linux.Seccomp, err = seccomp.Default(spec.Process.Capabilities.Bounding); err != nil {
				t.Fatal(err)
			}
			prog, err := seccomp.Compile(spec.Linux.Seccomp)
			if err != nil {
				t.Fatal(err)
			}
			ours, code := start(t, spec, Options{Seccomp: prog.Filter, SeccompFlags: prog.Flags, ID: "iso"}).wait()

			bundle, state := t.TempDir(), t.TempDir()
			spec.Linux.CgroupsPath = "/servin-plan-test"
			raw, err := json.Marshal(spec)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(filepath.Join(bundle, "config.json"), raw, 0o600); err != nil {
				t.Fatal(err)
			}
			cmd := exec.Command(runc, "--root", state, "run", "-b", bundle, "servin-plan-test")
			var stderr strings.Builder
			cmd.Stderr = &stderr
			null, err := os.Open(os.DevNull)
			if err != nil {
				t.Fatal(err)
			}
			defer null.Close()
			cmd.Stdin = null
			theirs, err := cmd.Output()
			if len(theirs) == 0 {
				t.Skipf("SKIP: runc cannot run here: %v: %s", err, stderr.String())
			}
			a, b := normal(ours), normal(string(theirs))
			if a != b || code != 0 {
				for _, l := range strings.Split(a, "\n") {
					if !strings.Contains("\n"+b+"\n", "\n"+l+"\n") {
						t.Errorf("ours alone: %s", l)
					}
				}
				for _, l := range strings.Split(b, "\n") {
					if !strings.Contains("\n"+a+"\n", "\n"+l+"\n") {
						t.Errorf("runc's alone: %s", l)
					}
				}
			}
		})
	}
}

var mountLine = regexp.MustCompile(`^\d+ \d+ \d+:\d+ (\S+ \S+) (\S+) .*- (\S+ \S+) .*`)

// normal drops what may differ: ids, order, options of superblocks, and the
// way read-only pseudo files systems are read-only.
func normal(out string) string {
	var lines []string
	for l := range strings.Lines(out) {
		l = strings.TrimSpace(l)
		if strings.HasPrefix(l, "SigQ:") || strings.HasPrefix(l, "SigIgn:") {
			// Signals pending for the user, all over the host; signals ignored, which
			// runc hands down from whoever started the tests.
			continue
		}
		if strings.HasPrefix(l, "/dev/core ") || l == "/proc/kcore" {
			continue // runc makes the link where the host's kernel has the file
		}
		if m := mountLine.FindStringSubmatch(l); m != nil {
			if strings.Contains(m[1], " / ") || strings.HasSuffix(m[1], " /") {
				m[1], m[3] = "/", "root"
			}
			l = m[1] + " " + m[2] + " " + m[3]
		}
		lines = append(lines, l)
	}
	return strings.Join(lines, "\n")
}
