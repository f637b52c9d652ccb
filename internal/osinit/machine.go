package osinit

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/gpt"
	"github.com/cloudos-io/cloudos/internal/osinit/breakglass"
	"github.com/cloudos-io/cloudos/internal/osinit/data"
	"github.com/cloudos-io/cloudos/internal/osinit/modules"
	"github.com/cloudos-io/cloudos/internal/osinit/process"
	"github.com/cloudos-io/cloudos/internal/osinit/uevent"
	"github.com/cloudos-io/cloudos/internal/osinit/uplink"
	"github.com/cloudos-io/cloudos/internal/vmwire"
)

// machine is what the first process knows.
type machine struct {
	version   string
	cmdline   map[string]string
	bootID    string
	log       *log
	engineLog *log
	table     *process.Table
	modules   *modules.Set
	net       *uplink.Net
	gate      *breakglass.Gate
	orders    chan order
	come      broadcast
	ready     chan struct{} // closed when the engine has answered once

	// distribution says that the machine is one of WSL2 (distribution.go); drives has Windows' drives then.
	distribution bool
	drives       int

	shareMu  sync.Mutex // held over mounting, never inside mu
	unlockMu sync.Mutex // held over a guess at the data's key

	mu        sync.Mutex
	state     string
	problems  []string
	boot      map[string]float64
	engine    vmwire.Engine
	data      data.Device
	dataKind  string
	mounts    []vmwire.Mount
	synced    bool
	hostClock bool
	changed   chan struct{}
	host      string // the configured name
	document  []byte
	trust     vmwire.Trust
	recovery  string // a recovery key that was just made
	// dataSecret is what the TPM keeps, of the key slot dataSlot; nil is none.
	dataSecret []byte
	dataSlot   int
	// recoveryShown says whether the console shows it.
	recoveryShown bool
	configSource  string
	safeAt        []string // where safe mode serves the system's API over the network

	// Of run alone.
	engineArgs []string
	beside     sync.WaitGroup // loads modules from the initial file system
	initial    *modules.Set   // those of the initial file system
	meet       func()         // loads what the host and the network are met with, once
	met        chan struct{}  // closed when they are
	virtual    bool           // in VM mode: there is a host to be met
	hosted     chan struct{}  // closed when it has set the clock and mounted its shares
	quotas     chan struct{}  // closed when the kernel has what the data's quotas need
	unpacked   *os.Root       // the initial file system
	esp        gpt.GUID       // of the boot partition that the system was started from; zero is not known
	home       data.Disk      // the disk that the root is on, if it has slots
	prepared   *waitingEngine
	netStop    context.CancelFunc
	netDone    chan struct{}
}

// broadcast wakes those who wait for devices.
type broadcast struct {
	mu   sync.Mutex
	subs []chan struct{}
}

func (b *broadcast) subscribe() <-chan struct{} {
	ch := make(chan struct{}, 1)
	b.mu.Lock()
	b.subs = append(b.subs, ch)
	b.mu.Unlock()
	return ch
}

func (b *broadcast) notify() {
	b.mu.Lock()
	defer b.mu.Unlock()
	for _, ch := range b.subs {
		select {
		case ch <- struct{}{}:
		default:
		}
	}
}

func (m *machine) hostname() string {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.name()
}

// name is the machine's; mu is held.
func (m *machine) name() string {
	if m.host != "" {
		return m.host
	}
	if h := m.cmdline["hostname"]; h != "" {
		return h
	}
	return "cloudos"
}

// mark notes when something was done.
func (m *machine) mark(name string) {
	m.mu.Lock()
	m.boot[name] = uptime()
	m.mu.Unlock()
}

// change wakes who watches the status.
func (m *machine) change() {
	m.mu.Lock()
	close(m.changed)
	m.changed = make(chan struct{})
	m.mu.Unlock()
}

func (m *machine) setState(s string) {
	m.mu.Lock()
	if m.state != vmwire.StateStopping {
		m.state = s
	}
	m.mu.Unlock()
	m.change()
}

// problem notes what is wrong; the machine goes on.
func (m *machine) problem(err error) {
	text := strings.Join(strings.FieldsFunc(err.Error(), func(r rune) bool { return r == '\n' }), ";")
	m.log.Printf("%s", text)
	m.mu.Lock()
	if !slices.Contains(m.problems, text) {
		m.problems = append(m.problems, text)
	}
	m.mu.Unlock()
	m.change()
}

// fatal says why the machine cannot go on.
func (m *machine) fatal(err error) {
	m.log.Printf("cannot start: %v", err)
	panic(err)
}

// devices loads modules for devices that come.
func (m *machine) devices(ctx context.Context, l *uevent.Listener) {
	stop := context.AfterFunc(ctx, func() { l.Close() })
	defer stop()
	for ctx.Err() == nil {
		e, err := l.Next()
		if err != nil {
			if ctx.Err() == nil {
				m.log.Printf("cannot listen for devices: %v", err)
			}
			return
		}
		if e.Action == "add" && e.Env["MODALIAS"] != "" {
			if err := m.modules.Device(e.Env["MODALIAS"]); err != nil {
				m.log.Printf("%v", err)
			}
		}
		if e.Action == "add" || e.Action == "" || e.Action == "move" {
			m.come.notify()
		}
		if e.Action == "change" && e.Env["RESIZE"] == "1" {
			m.growAtStart()
		}
	}
}

// engineSocket is where the engine listens.
const engineSocket = "/run/servin/servin.sock"

// trusted is the file with the authorities that programs trust.
func trusted() string {
	if _, err := os.Stat(trustFile); err == nil {
		return trustFile
	}
	return certFile
}

// awaitEngine notes when the engine with a pid answers.
func (m *machine) awaitEngine(ctx context.Context, pid int) {
	for wait := 2 * time.Millisecond; ctx.Err() == nil; wait = min(wait*5/4, 5*time.Millisecond) {
		m.mu.Lock()
		gone := m.engine.PID != pid
		m.mu.Unlock()
		if gone {
			return
		}
		if c, err := net.Dial("unix", engineSocket); err == nil {
			c.Close()
			m.mu.Lock()
			m.engine.Ready = true
			first := m.state == vmwire.StateStarting
			if first {
				m.state = vmwire.StateReady
				m.boot["engine"] = uptime()
				close(m.ready)
			}
			m.mu.Unlock()
			if first {
				m.log.Printf("the engine answers")
			}
			m.change()
			return
		}
		time.Sleep(wait)
	}
}

// dialEngine connects to the engine, waiting for it to come up.
func (m *machine) dialEngine(ctx context.Context) (net.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, time.Minute)
	defer cancel()
	for {
		m.mu.Lock()
		ready, state, changed := m.engine.Ready, m.state, m.changed
		problems := strings.Join(m.problems, "; ")
		m.mu.Unlock()
		if ready {
			if c, err := (&net.Dialer{}).DialContext(ctx, "unix", engineSocket); err == nil {
				return c, nil
			}
			m.mu.Lock()
			m.engine.Ready = false
			pid := m.engine.PID
			m.mu.Unlock()
			go m.awaitEngine(context.WithoutCancel(ctx), pid)
		}
		if state == vmwire.StateSafe {
			return nil, fmt.Errorf("the machine is in safe mode and runs no engine: %s", problems)
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return nil, errors.New("the engine does not answer; see the machine's log")
		}
	}
}

func (m *machine) engineClient() *http.Client {
	return &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", engineSocket)
	}, DisableKeepAlives: true}}
}

// stopEngine has the engine end all containers.
func (m *machine) stopEngine(patience time.Duration) {
	m.mu.Lock()
	running := m.engine.Running
	m.mu.Unlock()
	if !running {
		return
	}
	m.log.Printf("stopping containers")
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://engine/servin/shutdown", strings.NewReader(`{"Containers":true}`))
	if err == nil {
		req.Header.Set("Content-Type", "application/json")
		var res *http.Response
		if res, err = m.engineClient().Do(req); err == nil {
			io.Copy(io.Discard, res.Body)
			res.Body.Close()
			if res.StatusCode >= 300 {
				err = errors.New(res.Status)
			}
		}
	}
	if err != nil {
		m.log.Printf("cannot stop containers in order: %v", err)
	}
}

// Status tells everything.
func (m *machine) Status() vmwire.Status {
	var uts unix.Utsname
	unix.Uname(&uts)
	m.mu.Lock()
	s := vmwire.Status{
		State: m.state, Version: m.version, Arch: runtime.GOARCH, Kernel: unix.ByteSliceToString(uts.Release[:]), BootID: m.bootID,
		Hostname: m.name(), Problems: slices.Clone(m.problems), ConfigSource: m.configSource, Time: time.Now(), Uptime: uptime(),
		Engine: m.engine, Mounts: slices.Clone(m.mounts), TimeSynchronized: m.synced, Boot: map[string]float64{}, Trust: m.trust,
	}
	for k, v := range m.boot {
		s.Boot[k] = v
	}
	n := m.net
	m.mu.Unlock()
	if n != nil {
		for _, l := range n.States() {
			s.Interfaces = append(s.Interfaces, vmwire.Interface{Name: l.Name, MAC: l.MAC, Up: l.Up, Addresses: l.Addresses, Gateway: l.Gateway, DNS: l.DNS, Problem: l.Problem})
		}
	}
	s.Memory, s.Data = m.Memory(), m.disk()
	return s
}

// Changed is closed at the next change.
func (m *machine) Changed() <-chan struct{} {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.changed
}

// SetClock sets the clock.
func (m *machine) SetClock(t time.Time) (time.Duration, error) {
	moved := time.Until(t)
	tv := unix.NsecToTimeval(t.UnixNano())
	if moved.Abs() > 5*time.Millisecond {
		if err := unix.Settimeofday(&tv); err != nil {
			return 0, fmt.Errorf("cannot set the clock: %w", err)
		}
	}
	m.mu.Lock()
	m.synced, m.hostClock = true, true
	m.mu.Unlock()
	m.change()
	return moved, nil
}

// Memory reads what the kernel says of memory.
func (m *machine) Memory() vmwire.Memory {
	var out vmwire.Memory
	b, _ := os.ReadFile("/proc/meminfo")
	for _, line := range strings.Split(string(b), "\n") {
		f := strings.Fields(line)
		if len(f) < 2 {
			continue
		}
		n, _ := strconv.ParseUint(f[1], 10, 64)
		switch f[0] {
		case "MemTotal:":
			out.Total = n << 10
		case "MemFree:":
			out.Free = n << 10
		case "MemAvailable:":
			out.Available = n << 10
		case "Cached:":
			out.Cached = n << 10
		}
	}
	if _, err := os.Stat("/sys/bus/virtio/drivers/virtio_balloon"); err == nil {
		found, _ := filepath.Glob("/sys/bus/virtio/drivers/virtio_balloon/virtio*")
		out.Balloon = len(found) > 0
	}
	if b, err := os.ReadFile("/proc/pressure/memory"); err == nil {
		fmt.Sscanf(string(b), "some avg10=%f", &out.Pressure)
	}
	return out
}

// ReleaseMemory gives memory back to the host: caches, and what is scattered.
func (m *machine) ReleaseMemory(caches bool) error {
	if caches {
		unix.Sync()
		if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("3"), 0); err != nil {
			return fmt.Errorf("cannot drop caches: %w", err)
		}
	}
	// Free pages are reported to the host in blocks: whole ones are made.
	if err := os.WriteFile("/proc/sys/vm/compact_memory", []byte("1"), 0); err != nil {
		return fmt.Errorf("cannot compact memory: %w", err)
	}
	return nil
}

func (m *machine) disk() vmwire.Disk {
	m.mu.Lock()
	d := vmwire.Disk{Device: m.data.Path, Kind: m.dataKind}
	dev := m.data
	m.mu.Unlock()
	if d.Kind == "disk" {
		d.Disk, _ = dev.Size()
	}
	var st unix.Statfs_t
	if unix.Statfs("/var", &st) == nil {
		d.Total, d.Free = st.Blocks*uint64(st.Bsize), st.Bavail*uint64(st.Bsize)
		d.Used = (st.Blocks - st.Bfree) * uint64(st.Bsize)
	}
	if m.distribution {
		d.Disk = d.Total
	}
	return d
}

// Mounts lists the shares.
func (m *machine) Mounts() []vmwire.Mount {
	m.mu.Lock()
	defer m.mu.Unlock()
	return append([]vmwire.Mount{}, m.mounts...)
}

// Touch tells watchers of files that they changed.
func (m *machine) Touch(paths []string) int {
	m.mu.Lock()
	shares := slices.Clone(m.mounts)
	m.mu.Unlock()
	told := 0
	for _, p := range paths {
		within := slices.ContainsFunc(shares, func(s vmwire.Mount) bool { return p == s.Target || strings.HasPrefix(p, s.Target+"/") })
		if within && filepath.Clean(p) == p && touch(p) == nil {
			told++
		}
	}
	return told
}

// touch sets the mode that a file has, which watchers see and nothing else does.
func touch(p string) error {
	fd, err := unix.Open(p, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC|unix.O_NOCTTY, 0)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return err
	}
	return unix.Fchmod(fd, uint32(st.Mode)&0o7777)
}

// GrowData grows the data to its disk.
func (m *machine) GrowData() (vmwire.Disk, error) {
	m.mu.Lock()
	dev, kind := m.data, m.dataKind
	m.mu.Unlock()
	if m.distribution {
		return vmwire.Disk{}, fault.New(fault.Unsupported, "cannot grow the data: the disk is WSL's (wsl --manage NAME --resize SIZE)")
	}
	if kind != "disk" {
		return vmwire.Disk{}, fault.New(fault.Unsupported, "cannot grow the data: there is no data disk")
	}
	if err := dev.GrowPartition(); err != nil {
		return vmwire.Disk{}, err
	}
	if _, err := dev.Grow("/var"); err != nil {
		return vmwire.Disk{}, err
	}
	m.change()
	return m.disk(), nil
}

// TrimData tells the host which blocks are free.
func (m *machine) TrimData() (uint64, error) {
	m.mu.Lock()
	kind := m.dataKind
	m.mu.Unlock()
	if kind != "disk" {
		return 0, nil
	}
	return data.Trim("/var")
}

// Sync writes what is unwritten.
func (m *machine) Sync() { unix.Sync() }

// Containers counts the running ones.
func (m *machine) Containers(ctx context.Context) (int, error) {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, "http://engine/info", nil)
	if err != nil {
		return 0, err
	}
	res, err := m.engineClient().Do(req)
	if err != nil {
		return 0, fault.New(fault.Unavailable, "cannot ask the engine: %w", err)
	}
	defer res.Body.Close()
	var info struct{ ContainersRunning, ContainersPaused int }
	if err := json.NewDecoder(io.LimitReader(res.Body, 8<<20)).Decode(&info); err != nil {
		return 0, fmt.Errorf("cannot read the engine's answer: %w", err)
	}
	return info.ContainersRunning + info.ContainersPaused, nil
}

// Shutdown begins to stop the machine.
func (m *machine) Shutdown(reboot bool, patience time.Duration) {
	select {
	case m.orders <- order{reboot, patience}:
	default: // it is stopping already
	}
}

// Log writes a log.
func (m *machine) Log(ctx context.Context, w io.Writer, source string, tail int, follow bool) error {
	switch source {
	case "kernel":
		return kernelLog(ctx, w, tail, follow)
	case "engine":
		return m.engineLog.write(ctx, w, tail, follow)
	}
	return m.log.write(ctx, w, tail, follow)
}
