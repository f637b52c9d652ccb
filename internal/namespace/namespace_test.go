package namespace

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func base(t *testing.T) string {
	t.Helper()
	if os.Getuid() != 0 {
		t.Skip("SKIP: making namespaces needs root")
	}
	dir := t.TempDir()
	if err := Prepare(dir); err != nil {
		t.Fatal(err)
	}
	if err := Prepare(dir); err != nil { // again
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := Unprepare(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

func inode(t *testing.T, path string) uint64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Ino
}

func TestMake(t *testing.T) {
	for name, size := range map[string]uint32{"host ids": 0, "own ids": 65536} {
		t.Run(name, func(t *testing.T) {
			dir := filepath.Join(base(t), "a")
			if err := os.Mkdir(dir, 0o711); err != nil {
				t.Fatal(err)
			}
			c := Config{Dir: dir, Size: 1 << 20, Net: true, IPC: true, UTS: true, UserHost: 300000, UserSize: size, Hostname: "pod-7",
				Sysctls: map[string]string{"kernel.shm_rmid_forced": "1", "fs.mqueue.msg_max": "100", "net/ipv4/ip_forward": "1"}}
			if err := Make(c); err != nil {
				t.Fatal(err)
			}
			for _, k := range []string{"net", "ipc", "uts"} {
				if inode(t, Path(dir, k)) == inode(t, "/proc/self/ns/"+k) {
					t.Errorf("%s is the host's", k)
				}
			}
			if got := inode(t, "/proc/self/ns/user"); size > 0 && inode(t, Path(dir, "user")) == got {
				t.Error("user is the host's")
			}
			var forward, lo string
			err := Enter(Path(dir, "net"), func() error {
				b, err := os.ReadFile("/proc/thread-self/net/dev")
				lo = string(b)
				f, _ := os.ReadFile("/proc/sys/net/ipv4/ip_forward")
				forward = strings.TrimSpace(string(f))
				return err
			})
			if err != nil || forward != "1" || !strings.Contains(lo, "lo:") || strings.Contains(lo, "eth") {
				t.Errorf("forward %q, %v: %s", forward, err, lo)
			}
			if !Mounted(dir) {
				t.Error("not mounted")
			}
			if err := Drop(dir); err != nil {
				t.Fatal(err)
			}
			if err := Drop(dir); err != nil || Mounted(dir) {
				t.Error("left: ", err)
			}
		})
	}
}

func TestMakeUndone(t *testing.T) {
	dir := filepath.Join(base(t), "a")
	if err := os.Mkdir(dir, 0o711); err != nil {
		t.Fatal(err)
	}
	for _, c := range []Config{
		{Dir: dir, IPC: true, Sysctls: map[string]string{"kernel.no_such": "1"}},
		{Dir: dir, IPC: true, Sysctls: map[string]string{"../../etc/passwd": "1"}},
		{Dir: dir, UTS: true, Hostname: strings.Repeat("x", 65)},
	} {
		if err := Make(c); err == nil || Mounted(dir) {
			t.Errorf("%+v: %v", c, err)
		}
	}
}

func TestSysctlPath(t *testing.T) {
	for in, want := range map[string]string{
		"net.ipv4.ip_forward": "/proc/sys/net/ipv4/ip_forward", "net/ipv4/conf/eth0.1/forwarding": "/proc/sys/net/ipv4/conf/eth0.1/forwarding",
		"": "", "a..b": "", "../x": "", "a/../b": "", "/etc": "", "a b": "",
	} {
		if got, err := sysctlPath(in); got != want || (err == nil) != (want != "") {
			t.Errorf("%q: %q, %v", in, got, err)
		}
	}
}
