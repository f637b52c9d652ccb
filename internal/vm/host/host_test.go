package host

import (
	"errors"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/mount"

	"github.com/cloudos-io/cloudos/api"
)

func TestDecide(t *testing.T) {
	l := limits{idle: time.Minute, off: time.Hour, leave: 15 * time.Minute}
	for name, x := range map[string]struct {
		s    situation
		want action
	}{
		"used a moment ago":      {situation{state: api.VMRunning, known: true, canSleep: true, idle: time.Second, limits: l}, nothing},
		"unused":                 {situation{state: api.VMRunning, known: true, canSleep: true, idle: time.Minute, limits: l}, fallAsleep},
		"a container runs":       {situation{state: api.VMRunning, known: true, containers: 1, canSleep: true, idle: time.Hour, limits: l}, nothing},
		"containers not counted": {situation{state: api.VMRunning, canSleep: true, idle: time.Hour, limits: l}, nothing},
		"cannot sleep":           {situation{state: api.VMRunning, known: true, idle: time.Hour, limits: l}, powerOff},
		"never sleeps":           {situation{state: api.VMRunning, known: true, canSleep: true, idle: 24 * time.Hour}, nothing},
		"sleeps":                 {situation{state: api.VMSleeping, slept: time.Minute, limits: l}, nothing},
		"slept long":             {situation{state: api.VMSleeping, slept: time.Hour, limits: l}, powerOff},
		"sleeps for ever":        {situation{state: api.VMSleeping, slept: 24 * time.Hour}, nothing},
		"off":                    {situation{state: api.VMOff, off: time.Minute, idle: time.Hour, limits: l}, nothing},
		"off for long":           {situation{state: api.VMOff, off: time.Hour, idle: time.Hour, limits: l}, leaveHost},
		"off but asked":          {situation{state: api.VMOff, off: time.Hour, idle: time.Second, limits: l}, nothing},
		"safe mode":              {situation{state: api.VMSafe, idle: 24 * time.Hour, limits: l}, nothing},
		"starting":               {situation{state: api.VMStarting, idle: 24 * time.Hour, limits: l}, nothing},
	} {
		if got := decide(x.s); got != x.want {
			t.Errorf("%s: %d, want %d", name, got, x.want)
		}
	}
	if restartAfterFall(0, 0) || !restartAfterFall(1, 0) || restartAfterFall(1, 3) {
		t.Error("restarts after a fall")
	}
}

func TestPublished(t *testing.T) {
	got := published([]container.Summary{{ID: "1", Names: []string{"/web"}, Ports: []container.PortSummary{
		{IP: netip.MustParseAddr("0.0.0.0"), PrivatePort: 80, PublicPort: 8080, Type: "tcp"},
		{IP: netip.MustParseAddr("::ffff:127.0.0.1"), PrivatePort: 53, PublicPort: 53, Type: "udp"},
		{PrivatePort: 9, Type: "tcp"},
		{PrivatePort: 9, PublicPort: 9, Type: "TCP"},
	}}})
	want := map[place]string{
		{netip.MustParseAddrPort("0.0.0.0:8080"), "tcp"}: "web",
		{netip.MustParseAddrPort("127.0.0.1:53"), "udp"}: "web",
		{netip.MustParseAddrPort("0.0.0.0:9"), "tcp"}:    "web",
	}
	if len(got) != len(want) {
		t.Fatalf("%v", got)
	}
	for k, v := range want {
		if got[k] != v {
			t.Errorf("%v: %q", k, got[k])
		}
	}
	for where, want := range map[string]string{"0.0.0.0:1": "127.0.0.1:1", "127.0.0.2:1": "127.0.0.2:1", "[::]:1": "[::1]:1", "192.0.2.1:1": "127.0.0.1:1"} {
		if got := target(place{netip.MustParseAddrPort(where), "tcp"}); got != want {
			t.Errorf("%s is reached at %s, want %s", where, got, want)
		}
	}
}

// TestMounted: the guest chooses no folder outside of the shares, also not through links.
func TestMounted(t *testing.T) {
	dir, outside := t.TempDir(), t.TempDir()
	for _, d := range []string{"a", "b"} {
		if err := os.Mkdir(filepath.Join(dir, d), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink(outside, filepath.Join(dir, "out")); err != nil {
		t.Fatal(err)
	}
	var list []container.Summary
	for _, src := range []string{dir + "/a", dir + "/b", dir + "/a", dir + "/out", outside, "/etc", dir + "/../x", "relative", dir + "/none"} {
		list = append(list, container.Summary{Mounts: []container.MountPoint{{Type: mount.TypeBind, Source: src}, {Type: mount.TypeVolume, Source: dir}}})
	}
	if got, want := mounted(list, []api.VMShare{{Path: dir}}, newLive(t).origin), []string{dir + "/a", dir + "/b"}; !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
}

func TestCheckMounts(t *testing.T) {
	h := &Host{}
	l := &live{}
	l.spec.Shares = append(l.spec.Shares, shareOf("/home/ada"))
	for body, want := range map[string]bool{
		`{"HostConfig":{"Binds":["/home/ada/x:/x"]}}`:                               true,
		`{"HostConfig":{"Binds":["/home/adam/x:/x"]}}`:                              false,
		`{"HostConfig":{"Binds":["name:/x"]}}`:                                      true,
		`{"HostConfig":{"Binds":["/var/run/docker.sock:/var/run/docker.sock"]}}`:    true,
		`{"HostConfig":{"Mounts":[{"Type":"bind","Source":"/srv","Target":"/x"}]}}`: false,
		`{"HostConfig":{"Mounts":[{"Type":"volume","Source":"v","Target":"/x"}]}}`:  true,
		`not json`: true,
	} {
		if err := h.checkMounts(l, []byte(body)); (err == nil) != want {
			t.Errorf("%s: %v", body, err)
		}
	}
}

func TestReserve(t *testing.T) {
	p := newPorts(newLive(t), quietLog())
	defer p.close()
	taken, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	other, err := net.Listen("tcp4", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	free := place{other.Addr().(*net.TCPAddr).AddrPort(), "tcp"}
	other.Close()
	busy := place{taken.Addr().(*net.TCPAddr).AddrPort(), "tcp"}
	if _, err := p.reserve([]place{free, busy}); err == nil || !strings.Contains(err.Error(), "address already in use") {
		t.Fatalf("a taken port: %v", err)
	}
	if len(p.open) != 0 {
		t.Fatal("what was reserved with it is still held")
	}
	release, err := p.reserve([]place{free})
	if err != nil {
		t.Fatal(err)
	}
	p.sync(nil)
	if len(p.open) != 1 {
		t.Fatal("a reservation was dropped before its container came")
	}
	p.sync(map[place]string{free: "web"})
	if l := p.list(); len(l) != 1 || l[0].Container != "web" {
		t.Fatalf("%+v", l)
	}
	release() // the container has it: nothing happens
	if len(p.open) != 1 {
		t.Fatal("a published port was released")
	}
	p.sync(map[place]string{busy: "other"})
	if l := p.list(); len(l) != 1 || l[0].Error == "" || l[0].Container != "other" {
		t.Fatalf("%+v", l)
	}
	if _, err := net.DialTimeout("tcp", free.addr.String(), time.Second); err == nil {
		t.Error("a port is published though nobody wants it any more")
	}
	if _, err := p.reserve([]place{{free.addr, "sctp"}}); err == nil || errors.Is(err, net.ErrClosed) {
		t.Errorf("sctp: %v", err)
	}
}

func TestConsole(t *testing.T) {
	path := filepath.Join(t.TempDir(), "console.log")
	c, err := newConsole(path)
	if err != nil {
		t.Fatal(err)
	}
	line := []byte(strings.Repeat("x", 1023) + "\n")
	for range 4096 { // four times its bound
		c.write(line)
	}
	c.write([]byte("Kernel panic\x1b[31m\n\n"))
	for _, p := range []string{path, path + ".1"} {
		if fi, err := os.Stat(p); err != nil || fi.Size() > maxConsole {
			t.Errorf("%s: %v %v", p, fi, err)
		}
	}
	if got := c.hint(); !strings.Contains(got, "Kernel panic") || strings.Contains(got, "\x1b") {
		t.Errorf("its last words: %q", got)
	}
	b, err := readTail(path, maxConsole)
	if err != nil || len(b) != maxConsole {
		t.Errorf("%d bytes, %v", len(b), err)
	}
	if got := string(lastLines([]byte("a\nb\nc\n"), 2)); got != "b\nc\n" {
		t.Errorf("last lines: %q", got)
	}
}
