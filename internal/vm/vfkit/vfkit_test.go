//go:build unix

package vfkit

import (
	"encoding/json"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/cloudos-io/cloudos/api"
	"github.com/cloudos-io/cloudos/internal/vm"
	"github.com/cloudos-io/cloudos/internal/vm/vmtest"
)

// TestMain is a simulated vfkit where the environment says so.
func TestMain(m *testing.M) {
	if os.Getenv("SIMULATED_VFKIT") != "" {
		simulate(os.Args[1:])
	}
	os.Exit(m.Run())
}

// simulate takes vfkit's command line as its documentation describes it.
func simulate(args []string) {
	fail := func(format string, a ...any) { fmt.Fprintf(os.Stderr, format+"\n", a...); os.Exit(1) }
	if len(args) == 1 && args[0] == "--version" {
		fmt.Println("vfkit version: v0.6.1 (simulated)")
		os.Exit(0)
	}
	var rest, port string
	disks := 0
	for i := 0; i+1 < len(args); i += 2 {
		name, rem, _ := strings.Cut(args[i+1], ",")
		opts := map[string]string{}
		for _, o := range strings.Split(rem, ",") {
			k, v, _ := strings.Cut(o, "=")
			opts[k] = v
		}
		switch {
		case args[i] == "--restful-uri":
			rest = strings.TrimPrefix(args[i+1], "unix://")
		case args[i] == "--cpus", args[i] == "--memory":
		case args[i] == "--bootloader" && name == "linux":
			for _, f := range []string{opts["kernel"], opts["initrd"]} {
				if _, err := os.Stat(f); err != nil {
					fail("bootloader: %v", err)
				}
			}
		case args[i] == "--device" && name == "virtio-blk":
			disks++
			if _, err := os.Stat(opts["path"]); err != nil {
				fail("disk: %v", err)
			}
		case args[i] == "--device" && name == "virtio-vsock":
			port = opts["socketURL"]
		case args[i] == "--device":
		default:
			fail("unknown option %s", args[i])
		}
	}
	if rest == "" || port == "" || disks != 2 {
		fail("incomplete: %v", args)
	}
	p, err := net.Listen("unix", port)
	if err != nil {
		fail("%v", err)
	}
	go func() {
		for {
			if c, err := p.Accept(); err == nil {
				c.Close()
			}
		}
	}()
	l, err := net.Listen("unix", rest)
	if err != nil {
		fail("%v", err)
	}
	var paused atomic.Bool
	http.HandleFunc("GET /vm/state", func(w http.ResponseWriter, r *http.Request) {
		st := "VirtualMachineStateRunning"
		if paused.Load() {
			st = "VirtualMachineStatePaused"
		}
		json.NewEncoder(w).Encode(map[string]any{"state": st, "canPause": !paused.Load(), "canResume": paused.Load()})
	})
	http.HandleFunc("POST /vm/state", func(w http.ResponseWriter, r *http.Request) {
		var in struct{ State string }
		json.NewDecoder(r.Body).Decode(&in)
		switch {
		case in.State == "Pause" && !paused.Load(), in.State == "Resume" && paused.Load():
			paused.Store(in.State == "Pause")
			w.WriteHeader(http.StatusAccepted)
		case in.State == "HardStop":
			os.Exit(0)
		default:
			http.Error(w, "cannot "+in.State, http.StatusInternalServerError)
		}
	})
	http.Serve(l, nil)
}

func spec(t *testing.T) vm.Spec {
	dir, err := os.MkdirTemp("", "v")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	s := vm.Spec{Name: "test", CPUs: 2, Memory: 1 << 30, Disk: 16 << 20, Data: filepath.Join(dir, "data.img"), Run: filepath.Join(dir, "run"), State: dir,
		Image:  vm.Image{Kernel: filepath.Join(dir, "kernel"), Initrd: filepath.Join(dir, "initrd"), Root: filepath.Join(dir, "root"), CommandLine: "console=ttyS0 quiet"},
		Shares: []vm.Share{{VMShare: api.VMShare{Path: dir}, Tag: "share0"}}}
	for _, f := range []string{s.Image.Kernel, s.Image.Initrd, s.Image.Root} {
		if err := os.WriteFile(f, []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return s
}

func TestDriver(t *testing.T) {
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	d := New(Config{Program: self, Environment: []string{"SIMULATED_VFKIT=1"}})
	h, err := d.Probe(t.Context(), vm.Image{}, "")
	if err != nil || !strings.Contains(h.Version, "simulated") {
		t.Fatalf("%+v %v", h, err)
	}
	// Without a record's detail the process id is unknown: vfkit tells none.
	vmtest.Suite{Driver: d, Host: h, Spec: spec, Lost: true}.Run(t)
}

func TestArgs(t *testing.T) {
	s := spec(t)
	a, err := args(s)
	if err != nil {
		t.Fatal(err)
	}
	line := strings.Join(a, " ")
	for _, want := range []string{`cmdline="console=hvc0 quiet"`, "deviceId=cloudos-root", "deviceId=cloudos-data", "mountTag=share0", "port=1024"} {
		if !strings.Contains(line, want) {
			t.Errorf("no %s in %s", want, line)
		}
	}
	for _, spoil := range []func(*vm.Spec){func(s *vm.Spec) { s.Data = "/a,b" }, func(s *vm.Spec) { s.Shares[0].Path = `/a"b` }} {
		bad := spec(t)
		spoil(&bad)
		if _, err := args(bad); err == nil {
			t.Error("a path that would be another option")
		}
	}
}
