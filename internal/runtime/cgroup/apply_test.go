package cgroup

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"
	"time"

	"github.com/cloudos-io/cloudos/internal/fault"
	specs "github.com/opencontainers/runtime-spec/specs-go"
	"golang.org/x/sys/unix"
)

func ptr[T any](v T) *T { return &v }

func TestSettingsV2(t *testing.T) {
	r := &specs.LinuxResources{
		CPU:    &specs.LinuxCPU{Shares: ptr(uint64(1024)), Quota: ptr(int64(50000)), Burst: ptr(uint64(10)), Idle: ptr(int64(1)), Cpus: "0-1", Mems: "0"},
		Memory: &specs.LinuxMemory{Limit: ptr(int64(1 << 20)), Swap: ptr(int64(3 << 20)), Reservation: ptr(int64(1 << 19))},
		Pids:   &specs.LinuxPids{Limit: ptr(int64(-1))},
		BlockIO: &specs.LinuxBlockIO{Weight: ptr(uint16(500)), ThrottleReadBpsDevice: []specs.LinuxThrottleDevice{
			{Rate: 100}},
		},
		HugepageLimits: []specs.LinuxHugepageLimit{{Pagesize: "2MB", Limit: 4}},
		Unified:        map[string]string{"memory.high": "5"},
	}
	r.BlockIO.ThrottleReadBpsDevice[0].Major, r.BlockIO.ThrottleReadBpsDevice[0].Minor = 8, 16
	set, err := settingsV2(r, false)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, s := range set {
		got = append(got, s.file+"="+s.value)
	}
	want := "cpu.weight=100 cpu.idle=1 cpu.max=50000 100000 cpu.max.burst=10 cpuset.cpus=0-1 cpuset.mems=0 memory.swap.max=2097152 memory.max=1048576 memory.low=524288 " +
		"pids.max=max io.weight=4950 io.max=8:16 rbps=100 hugetlb.2MB.max=4 memory.high=5"
	if strings.Join(got, " ") != want {
		t.Errorf("got  %s\nwant %s", strings.Join(got, " "), want)
	}
	for name, bad := range map[string]*specs.LinuxResources{
		"path":               {Unified: map[string]string{"../x.y": "1"}},
		"swap without limit": {Memory: &specs.LinuxMemory{Swap: ptr(int64(5))}},
		"swap below memory":  {Memory: &specs.LinuxMemory{Limit: ptr(int64(6)), Swap: ptr(int64(5))}},
	} {
		if _, err := settingsV2(bad, false); !fault.Is(err, fault.Invalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if set, _ := settingsV2(&specs.LinuxResources{BlockIO: &specs.LinuxBlockIO{Weight: ptr(uint16(500))}}, true); set[0].file != "io.bfq.weight" || set[0].value != "500" {
		t.Errorf("%+v", set)
	}
}

func TestClean(t *testing.T) {
	for in, want := range map[string]string{"": "/", "a/b": "/a/b", "//a//": "/a", "/a/./b": "/a/b"} {
		if got, err := Clean(in); err != nil || got != want {
			t.Errorf("%q: %q %v", in, got, err)
		}
	}
	for _, in := range []string{"..", "a/../b", "a\x00b", "/../..", strings.Repeat("a/", 2000)} {
		if got, err := Clean(in); err == nil {
			t.Errorf("%q: %q", in, got)
		}
	}
}

func TestAllowList(t *testing.T) {
	deny := specs.LinuxDeviceCgroup{Access: "rwm"}
	c := specs.LinuxDeviceCgroup{Allow: true, Type: "c", Major: ptr(int64(1)), Minor: ptr(int64(3)), Access: "rw"}
	all := specs.LinuxDeviceCgroup{Allow: true, Access: "rwm"}
	for i, x := range []struct {
		rules []specs.LinuxDeviceCgroup
		want  bool
	}{{[]specs.LinuxDeviceCgroup{deny, c}, true}, {[]specs.LinuxDeviceCgroup{c}, false}, {[]specs.LinuxDeviceCgroup{deny, c, {Type: "c"}}, false}, {[]specs.LinuxDeviceCgroup{deny, all}, false}} {
		if got := allowList(x.rules); got != x.want {
			t.Errorf("%d: %v", i, got)
		}
	}
	if DeviceKey([]specs.LinuxDeviceCgroup{deny, c}) == DeviceKey([]specs.LinuxDeviceCgroup{deny, all}) || deviceLine(c) != "c 1:3 rw" {
		t.Error("keys")
	}
}

// host is the machine's; the test makes its groups under a parent of its own.
func host(t *testing.T) (*Host, string) {
	h, err := Detect()
	if err != nil {
		t.Fatal(err)
	}
	if h.Mode == None {
		t.Skip("SKIP: there are no cgroups that may be written to")
	}
	parent := fmt.Sprintf("/servin-test%d/nested", os.Getpid())
	t.Cleanup(func() {
		h.RemoveParent(parent)
		h.RemoveParent(fmt.Sprintf("/servin-test%d", os.Getpid()))
		if left := h.Children(fmt.Sprintf("/servin-test%d", os.Getpid())); len(left) > 0 {
			t.Errorf("left: %v", left)
		}
	})
	return h, parent
}

func TestLifecycle(t *testing.T) {
	h, parent := host(t)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	g, err := h.Create(parent, "a")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := h.Create(parent, "a"); !fault.Is(err, fault.Conflict) {
		t.Errorf("twice: %v", err)
	}
	for _, id := range []string{"", ".", "..", "a/b", "a\x00"} {
		if _, err := h.Create(parent, id); !fault.Is(err, fault.Invalid) {
			t.Errorf("%q: %v", id, err)
		}
	}
	if n := h.Children(parent); len(n) != 1 || n[0] != "a" {
		t.Errorf("children %v", n)
	}
	// A process joins; it is listed, frozen, signalled; the group cannot go before it.
	cmd := exec.Command("sleep", "100")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer cmd.Process.Kill()
	for _, d := range g.dirs() {
		if err := write(d, "cgroup.procs", fmt.Sprint(cmd.Process.Pid)); err != nil {
			t.Fatal(err)
		}
	}
	if p, err := g.Pids(); err != nil || len(p) != 1 || p[0] != cmd.Process.Pid {
		t.Errorf("pids %v %v", p, err)
	}
	if err := g.Freeze(ctx); err != nil {
		t.Fatal(err)
	}
	if f, _ := g.Frozen(); !f {
		t.Error("it is not frozen")
	}
	if err := g.Thaw(ctx); err != nil {
		t.Fatal(err)
	}
	short, stop := context.WithTimeout(ctx, 50*time.Millisecond)
	if err := g.Remove(short); err == nil {
		t.Error("a group with a process was removed")
	}
	stop()
	if s, err := g.Stats(); err != nil || s.SystemCPU == 0 {
		t.Errorf("%+v %v", s, err)
	}
	if err := g.Freeze(ctx); err != nil { // a frozen one dies all the same
		t.Fatal(err)
	}
	if err := g.Signal(ctx, int(unix.SIGKILL)); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); err == nil {
		t.Error("it ended well")
	}
	// What the container made below goes too.
	for _, d := range g.dirs() {
		if err := os.MkdirAll(d+"/x/y", 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := g.Remove(ctx); err != nil {
		t.Fatal(err)
	}
	if err := g.Remove(ctx); err != nil {
		t.Errorf("again: %v", err)
	}
}
