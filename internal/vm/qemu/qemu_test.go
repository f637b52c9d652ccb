package qemu

import (
	"context"
	"encoding/binary"
	"flag"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/cloudos-io/cloudos/api"
	"github.com/cloudos-io/cloudos/internal/vm"
	"github.com/cloudos-io/cloudos/internal/vm/vmtest"
)

var update = flag.Bool("update", false, "write the golden files")

// TestArgs holds QEMU's command lines.
func TestArgs(t *testing.T) {
	spec := vm.Spec{Name: "vm-1000", CPUs: 4, Memory: 4 << 30, Disk: 64 << 30,
		Image:  vm.Image{CommandLine: "console=ttyS0 quiet", Kernel: "/img/kernel", Initrd: "/img/initrd", Root: "/img/root.img"},
		Shares: []vm.Share{{VMShare: api.VMShare{Path: "/home/ada"}, Tag: "share0"}}}
	for name, p := range map[string]plan{
		"linux-kvm-root": {goos: "linux", goarch: "amd64", accelerator: "kvm", spec: spec, kernel: "/proc/self/fd/6", initrd: "/proc/self/fd/7", root: "/dev/fdset/1", data: "/dev/fdset/2",
			sets: []fdset{{4, 1}, {5, 2}}, uuid: "u", monitor: "fd=8", console: "fd=9", port: "fd=10", share: []string{"fd=11"}, sandbox: true},
		"linux-tcg":       {goos: "linux", goarch: "amd64", accelerator: "tcg", spec: spec, kernel: "/img/kernel", initrd: "/img/initrd", root: "/dev/fdset/1", data: "/dev/fdset/2", sets: []fdset{{4, 1}, {5, 2}}, uuid: "u", monitor: "fd=6", console: "fd=7", port: "fd=8", sandbox: true},
		"linux-arm64":     {goos: "linux", goarch: "arm64", accelerator: "kvm", spec: spec, kernel: "/img/kernel", initrd: "/img/initrd", root: "/dev/fdset/1", data: "/dev/fdset/2", sets: []fdset{{4, 1}, {5, 2}}, uuid: "u", monitor: "fd=6", console: "fd=7", port: "fd=8", sandbox: true},
		"linux-arm64-tcg": {goos: "linux", goarch: "arm64", accelerator: "tcg", spec: spec, kernel: "/img/kernel", initrd: "/img/initrd", root: "/dev/fdset/1", data: "/dev/fdset/2", sets: []fdset{{4, 1}, {5, 2}}, uuid: "u", monitor: "fd=6", console: "fd=7", port: "fd=8", sandbox: true},
		"darwin-hvf":      {goos: "darwin", goarch: "arm64", accelerator: "hvf", spec: spec, kernel: "/img/kernel", initrd: "/img/initrd", root: "/img/root.img", data: "/d,ata.img", uuid: "u", monitor: "fd=3", console: "fd=4", port: "fd=5"},
		"windows":         {goos: "windows", goarch: "amd64", accelerator: "whpx", spec: spec, kernel: `C:\img\kernel`, initrd: `C:\img\initrd`, root: `C:\img\root.img`, data: `C:\data.img`, uuid: "u", monitor: `path=C:\m.sock`, console: `path=C:\c.sock`, port: `path=C:\p.sock`},
	} {
		got := strings.ReplaceAll(strings.Join(p.args(), "\n"), "\n-", "\n\n-") + "\n"
		file := filepath.Join("testdata", name+".golden")
		if *update {
			os.MkdirAll("testdata", 0o755)
			if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		if want, err := os.ReadFile(file); err != nil || got != string(want) {
			t.Errorf("%s: %v: got\n%s", name, err, got)
		}
	}
}

// haltingKernel is the smallest file that QEMU takes for a Linux kernel: it halts at its first instruction.
func haltingKernel() []byte {
	k := make([]byte, 8<<10)
	k[0x1f1] = 4 // setup sectors
	binary.LittleEndian.PutUint16(k[0x1fe:], 0xaa55)
	copy(k[0x200:], []byte{0xeb, 0x66}) // jmp 0x268
	copy(k[0x202:], "HdrS")
	binary.LittleEndian.PutUint16(k[0x206:], 0x0208)
	k[0x211] = 1 // loaded high
	binary.LittleEndian.PutUint32(k[0x22c:], 0x37ffffff)
	copy(k[0x268:], []byte{0xfa, 0xf4, 0xeb, 0xfd}) // cli; hlt; again
	return k
}

func TestDriver(t *testing.T) {
	if _, err := exec.LookPath(program(runtime.GOARCH)); err != nil || runtime.GOARCH != "amd64" {
		t.Skipf("SKIP: %s is not installed, or its kernel here is not amd64", program(runtime.GOARCH))
	}
	vmtest.Suite{Driver: New(Config{}), Host: vm.Host{Accelerator: "tcg"}, Spec: func(t *testing.T) vm.Spec {
		dir, err := os.MkdirTemp("", "q") // sockets want a short path
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { os.RemoveAll(dir) })
		s := vm.Spec{Name: "test", CPUs: 1, Memory: 128 << 20, Disk: 16 << 20, Data: filepath.Join(dir, "data.img"), Run: filepath.Join(dir, "run"), State: dir,
			Image: vm.Image{Kernel: filepath.Join(dir, "kernel"), Initrd: filepath.Join(dir, "initrd"), Root: filepath.Join(dir, "root"), CommandLine: "quiet"}}
		for path, b := range map[string][]byte{s.Image.Kernel: haltingKernel(), s.Image.Initrd: make([]byte, 512), s.Image.Root: make([]byte, 1<<20)} {
			if err := os.WriteFile(path, b, 0o600); err != nil { // not for everybody: QEMU gets descriptors
				t.Fatal(err)
			}
		}
		share := filepath.Join(dir, "share")
		os.Mkdir(share, 0o755)
		s.Shares = []vm.Share{{VMShare: api.VMShare{Path: share}, Tag: "share0"}}
		return s
	}}.Run(t)
}

// TestArm64 has QEMU take the whole command line for an arm64 guest: its board, its
// serial line, its devices and its places for shares. It is stopped before its first instruction.
func TestArm64(t *testing.T) {
	path, err := exec.LookPath(program("arm64"))
	if err != nil || runtime.GOOS != "linux" {
		t.Skipf("SKIP: %s is not installed", program("arm64"))
	}
	dir, err := os.MkdirTemp("", "q")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	at := func(name string) string { return filepath.Join(dir, name) }
	for name, size := range map[string]int{"kernel": 8 << 10, "initrd": 512, "root": 1 << 20, "data": 16 << 20} {
		if err := os.WriteFile(at(name), make([]byte, size), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	p := plan{goos: "linux", goarch: "arm64", accelerator: "tcg", kernel: at("kernel"), initrd: at("initrd"), root: at("root"), data: at("data"), uuid: "6b1a3a54-2f5c-4f4e-9d3e-0c5f8e1a2b3c",
		monitor: "path=" + at("m"), console: "path=" + at("c"), port: "path=" + at("p"), sandbox: true,
		spec: vm.Spec{Name: "test", CPUs: 2, Memory: 256 << 20, Image: vm.Image{CommandLine: "console=ttyAMA0 quiet"}}}
	out := &tail{max: 64 << 10}
	cmd := exec.Command(path, p.args()...)
	cmd.Stdout, cmd.Stderr = out, out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	defer func() { cmd.Process.Kill(); <-ended }()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	var c net.Conn
	for c == nil {
		if c, err = net.Dial("unix", at("m")); err == nil {
			break
		}
		select {
		case err := <-ended:
			ended <- err
			t.Fatalf("QEMU ended: %v\n%s", err, out.bytes())
		case <-ctx.Done():
			t.Fatalf("%v\n%s", err, out.bytes())
		case <-time.After(10 * time.Millisecond):
		}
	}
	m, err := converse(ctx, c)
	if err != nil {
		t.Fatalf("%v\n%s", err, out.bytes())
	}
	defer m.close()
	var status struct{ Status string }
	if err := m.do(ctx, "query-status", nil, &status); err != nil || status.Status != "prelaunch" {
		t.Fatalf("%+v, %v", status, err)
	}
	var serial []struct{ Label string }
	if err := m.do(ctx, "query-chardev", nil, &serial); err != nil || len(serial) < 3 {
		t.Fatalf("%+v, %v", serial, err)
	}
}

// TestMonitor speaks to a monitor that misbehaves.
func TestMonitor(t *testing.T) {
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	serve := func(answer func(net.Conn)) net.Conn {
		a, b := net.Pipe()
		go func() { answer(b); b.Close() }()
		return a
	}
	for name, words := range map[string]string{
		"no greeting":  `{"event":"STOP"}` + "\n",
		"no json":      "hello\n",
		"ends at once": "",
		"endless line": strings.Repeat("x", maxLine+100),
	} {
		if m, err := converse(ctx, serve(func(c net.Conn) { c.Write([]byte(words)) })); err == nil {
			m.close()
			t.Errorf("%s: a conversation", name)
		}
	}
	m, err := converse(ctx, serve(func(c net.Conn) {
		buf := make([]byte, 4096)
		c.Write([]byte(`{"QMP":{}}` + "\n"))
		c.Read(buf)
		c.Write([]byte(`{"return":{},"id":77}` + "\n" + `{"return":{},"id":1}` + "\n")) // an answer to nobody, and ours
		c.Read(buf)
		c.Write([]byte(`{"event":"SHUTDOWN","data":{"guest":true}}` + "\n" + `{"error":{"class":"x","desc":"no such device"},"id":2}` + "\n"))
		c.Read(buf)
	}))
	if err != nil {
		t.Fatal(err)
	}
	defer m.close()
	if err := m.do(ctx, "device_add", nil, nil); err == nil || !strings.Contains(err.Error(), "no such device") {
		t.Errorf("a refusal: %v", err)
	}
	if _, ok := m.event("SHUTDOWN"); !ok {
		t.Error("an event was lost")
	}
	if err := m.do(ctx, "query-status", nil, nil); err == nil {
		t.Error("an answer from a monitor that has ended")
	}
}

func FuzzMessage(f *testing.F) {
	f.Add([]byte(`{"return":{},"id":1}`))
	f.Add([]byte(`{"event":"STOP","timestamp":{"seconds":1}}`))
	f.Fuzz(func(t *testing.T, line []byte) { parseMessage(line) })
}
