package dhcp

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"syscall"
	"time"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Argv0 is the name that servind has as a keeper.
const Argv0 = "servin-dhcp"

// Entry is a lease that is kept.
type Entry struct {
	// Key names it: the endpoint's id.
	Key string
	// NetNS is the inode of the network namespace.
	NetNS    uint64
	Identity Identity
	Lease    Lease
	// Trouble is why it could not be renewed the last time.
	Trouble string `json:",omitempty"`
}

// message is a line of the keeper's protocol, each way.
type message struct {
	Op      string  `json:",omitempty"` // keep, drop, list, quit
	Entry   *Entry  `json:",omitempty"`
	Key     string  `json:",omitempty"`
	Entries []Entry `json:",omitempty"`
	Error   string  `json:",omitempty"`
}

const (
	socketName = "s"
	maxLine    = 8 << 20
	// idle is how long a keeper without leases stays.
	idle = 30 * time.Second
)

// Main is the keeper's main function; ours tells whether this process is one.
func Main() (code int, ours bool) {
	if len(os.Args) != 2 || os.Args[0] != Argv0 {
		return 0, false
	}
	log := slog.New(slog.NewJSONHandler(os.Stderr, nil))
	if err := keep(os.Args[1], log); err != nil {
		log.Error("the DHCP keeper ends", "cause", err)
		return 1, true
	}
	return 0, true
}

// keeper renews leases.
type keeper struct {
	log *slog.Logger

	mu      sync.Mutex
	entries map[string]*kept
	last    time.Time // since when there is none
	quit    chan struct{}
	tasks   sync.WaitGroup
}

type kept struct {
	Entry
	cancel context.CancelFunc
}

func keep(dir string, log *slog.Logger) error {
	l, err := net.Listen("unix", filepath.Join(dir, socketName))
	if err != nil {
		return err
	}
	k := &keeper{log: log, entries: map[string]*kept{}, last: time.Now(), quit: make(chan struct{})}
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go k.serve(c)
		}
	}()
	for {
		select {
		case <-k.quit:
		case <-time.After(time.Second):
			k.mu.Lock()
			stay := len(k.entries) > 0 || time.Since(k.last) < idle
			k.mu.Unlock()
			if stay {
				continue
			}
		}
		// Closing removes the socket: who comes later starts another keeper.
		l.Close()
		k.mu.Lock()
		for _, e := range k.entries {
			e.cancel()
		}
		k.mu.Unlock()
		k.tasks.Wait()
		return nil
	}
}

// serve answers one client; the directory lets the engine's user in alone.
func (k *keeper) serve(c net.Conn) {
	defer c.Close()
	if !sameUser(c) {
		return
	}
	in := bufio.NewReader(io.LimitReader(c, maxLine))
	_ = c.SetDeadline(time.Now().Add(30 * time.Second))
	var q, a message
	line, err := in.ReadBytes('\n')
	if err == nil {
		err = json.Unmarshal(line, &q)
	}
	if err == nil {
		a, err = k.answer(q)
	}
	if err != nil {
		a.Error = err.Error()
	}
	b, _ := json.Marshal(a)
	_, _ = c.Write(append(b, '\n'))
	if q.Op == "quit" {
		close(k.quit)
	}
}

func sameUser(c net.Conn) bool {
	u, ok := c.(*net.UnixConn)
	if !ok {
		return false
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return false
	}
	same := false
	_ = raw.Control(func(fd uintptr) {
		if p, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED); err == nil {
			same = int(p.Uid) == os.Geteuid()
		}
	})
	return same
}

func (k *keeper) answer(q message) (a message, err error) {
	k.mu.Lock()
	defer k.mu.Unlock()
	switch q.Op {
	case "keep":
		if q.Entry == nil || q.Entry.Key == "" {
			return a, errors.New("cannot keep a lease without a key")
		}
		if old := k.entries[q.Entry.Key]; old != nil {
			if old.Lease.Got.After(q.Entry.Lease.Got) {
				return a, nil // what is here is newer than what the engine remembers
			}
			old.cancel()
		}
		ctx, cancel := context.WithCancel(context.Background())
		e := &kept{Entry: *q.Entry, cancel: cancel}
		k.entries[e.Key] = e
		k.tasks.Go(func() { k.follow(ctx, e) })
	case "drop":
		if e := k.entries[q.Key]; e != nil {
			e.cancel()
			k.remove(q.Key)
		}
	case "list":
		for _, e := range k.entries {
			a.Entries = append(a.Entries, e.Entry)
		}
	case "quit":
	default:
		return a, fmt.Errorf("unknown operation %q", q.Op)
	}
	return a, nil
}

// remove forgets an entry; k.mu is held.
func (k *keeper) remove(key string) {
	delete(k.entries, key)
	k.last = time.Now()
}

// follow renews one lease until ctx ends or its namespace is gone.
func (k *keeper) follow(ctx context.Context, e *kept) {
	wait := time.Duration(0)
	for {
		k.mu.Lock()
		l := e.Lease
		k.mu.Unlock()
		next := time.Until(l.Renew)
		if wait > 0 { // it was tried: half of what is left, as RFC 2131, 4.4.5 has it
			until := l.Rebind
			if time.Now().After(until) {
				until = l.End
			}
			next = min(max(time.Until(until)/2, 2*time.Second), time.Minute)
		}
		select {
		case <-time.After(max(next, 0)):
		case <-ctx.Done():
			return
		}
		ns, err := find(e.NetNS)
		if err != nil {
			k.log.Info("a lease's container is gone", "key", e.Key, "address", l.Addr)
			k.mu.Lock()
			if k.entries[e.Key] == e {
				k.remove(e.Key)
			}
			k.mu.Unlock()
			return
		}
		got, err := k.again(ctx, ns, e, l)
		ns.Close()
		if ctx.Err() != nil {
			return
		}
		k.mu.Lock()
		if err != nil {
			e.Trouble, wait = err.Error(), 1
		} else {
			e.Lease, e.Trouble, wait = got, "", 0
		}
		k.mu.Unlock()
		if err != nil {
			k.log.Warn("a lease could not be renewed", "key", e.Key, "address", l.Addr, "cause", err)
		}
	}
}

// again renews, or gets another lease where the server no longer knows this one.
func (k *keeper) again(ctx context.Context, ns *os.File, e *kept, l Lease) (Lease, error) {
	rctx, cancel := context.WithTimeout(ctx, Patience)
	got, err := renew(rctx, ns, e.Identity, l)
	cancel()
	if err == nil || !errors.Is(err, errRefused) && time.Now().Before(l.End) {
		return got, err
	}
	id := e.Identity
	id.Want = netip.Addr{}
	if got, err = Acquire(ctx, ns, id); err != nil {
		return got, err
	}
	if got.Addr != l.Addr {
		k.log.Warn("a container's address changes: its DHCP server wants it", "key", e.Key, "from", l.Addr, "to", got.Addr)
		return got, readdress(ns, id.IfName, l, got)
	}
	return got, nil
}

// readdress gives the link its new address, and the default route if it led
// through the old one's gateway.
func readdress(ns *os.File, name string, old, now Lease) error {
	h, err := netlink.NewHandleAt(netns.NsHandle(ns.Fd()), unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer h.Close()
	link, err := h.LinkByName(name)
	if err != nil {
		return err
	}
	addr := func(p netip.Prefix) *netlink.Addr {
		return &netlink.Addr{IPNet: &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), 32)}}
	}
	through := false
	if routes, err := h.RouteList(link, unix.AF_INET); err == nil {
		for _, r := range routes {
			through = through || r.Gw != nil && r.Gw.String() == old.Gateway.String()
		}
	}
	// The old one first: where it is the subnet's first, others of it go with it.
	_ = h.AddrDel(link, addr(old.Addr))
	if err := h.AddrReplace(link, addr(now.Addr)); err != nil {
		return err
	}
	if through && now.Gateway.IsValid() {
		return h.RouteReplace(&netlink.Route{LinkIndex: link.Attrs().Index, Gw: now.Gateway.AsSlice()})
	}
	return nil
}

// find opens the network namespace of an inode, by a process that is in it: to
// hold it open would keep it from ending with its container.
func find(inode uint64) (*os.File, error) {
	procs, err := os.ReadDir("/proc")
	if err != nil {
		return nil, err
	}
	want := "net:[" + strconv.FormatUint(inode, 10) + "]"
	for _, p := range procs {
		if _, err := strconv.Atoi(p.Name()); err != nil {
			continue
		}
		path := "/proc/" + p.Name() + "/ns/net"
		if have, err := os.Readlink(path); err != nil || have != want {
			continue
		}
		f, err := os.Open(path)
		if err != nil {
			continue
		}
		if Inode(f) == inode { // the process may have gone meanwhile
			return f, nil
		}
		f.Close()
	}
	return nil, os.ErrNotExist
}

// Inode is that of a namespace.
func Inode(ns *os.File) uint64 {
	var st unix.Stat_t
	if unix.Fstat(int(ns.Fd()), &st) != nil {
		return 0
	}
	return st.Ino
}

// Keeper is an engine's side of a keeper.
type Keeper struct {
	// Dir holds the keeper's socket and log, of mode 0700.
	Dir string

	mu sync.Mutex // one is started at a time
}

// Keep has a lease renewed; a keeper is started if there is none.
func (k *Keeper) Keep(ctx context.Context, e Entry) error {
	_, err := k.ask(ctx, message{Op: "keep", Entry: &e}, true)
	return err
}

// Drop has a lease forgotten.
func (k *Keeper) Drop(ctx context.Context, key string) error {
	_, err := k.ask(ctx, message{Op: "drop", Key: key}, false)
	return gone(err)
}

// List tells what is kept; nothing if there is no keeper.
func (k *Keeper) List(ctx context.Context) ([]Entry, error) {
	a, err := k.ask(ctx, message{Op: "list"}, false)
	return a.Entries, gone(err)
}

// Quit ends the keeper.
func (k *Keeper) Quit(ctx context.Context) error {
	_, err := k.ask(ctx, message{Op: "quit"}, false)
	return gone(err)
}

func gone(err error) error {
	if errors.Is(err, syscall.ECONNREFUSED) || errors.Is(err, os.ErrNotExist) {
		return nil
	}
	return err
}

func (k *Keeper) ask(ctx context.Context, q message, start bool) (message, error) {
	var a message
	k.mu.Lock()
	defer k.mu.Unlock()
	c, err := k.dial(ctx, start)
	if err != nil {
		return a, err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(30 * time.Second))
	b, err := json.Marshal(q)
	if err != nil {
		return a, err
	}
	if _, err := c.Write(append(b, '\n')); err != nil {
		return a, err
	}
	line, err := bufio.NewReader(io.LimitReader(c, maxLine)).ReadBytes('\n')
	if err != nil {
		return a, fmt.Errorf("cannot read the DHCP keeper's answer: %w", err)
	}
	if err := json.Unmarshal(line, &a); err != nil {
		return a, fmt.Errorf("cannot read the DHCP keeper's answer: %w", err)
	}
	if a.Error != "" {
		return a, errors.New(a.Error)
	}
	return a, nil
}

func (k *Keeper) dial(ctx context.Context, start bool) (net.Conn, error) {
	var d net.Dialer
	sock := filepath.Join(k.Dir, socketName)
	c, err := d.DialContext(ctx, "unix", sock)
	if err == nil || !start || gone(err) != nil {
		return c, err
	}
	if err := os.MkdirAll(k.Dir, 0o700); err != nil {
		return nil, err
	}
	_ = os.Remove(sock) // of one that was killed
	log, err := os.OpenFile(filepath.Join(k.Dir, "log"), os.O_CREATE|os.O_WRONLY|os.O_TRUNC|os.O_APPEND, 0o600)
	if err != nil {
		return nil, err
	}
	defer log.Close()
	null, err := os.Open(os.DevNull)
	if err != nil {
		return nil, err
	}
	defer null.Close()
	p, err := os.StartProcess("/proc/self/exe", []string{Argv0, k.Dir}, &os.ProcAttr{
		Dir: "/", Env: []string{"GOMEMLIMIT=32MiB", "GOGC=50", "PATH=/usr/sbin:/usr/bin:/sbin:/bin"}, Files: []*os.File{null, log, log},
		Sys: &syscall.SysProcAttr{Setsid: true},
	})
	if err != nil {
		return nil, fmt.Errorf("cannot start the DHCP keeper: %w", err)
	}
	go func() { _, _ = p.Wait() }()
	for end := time.Now().Add(10 * time.Second); ; {
		if c, err = d.DialContext(ctx, "unix", sock); err == nil {
			return c, nil
		}
		if time.Now().After(end) || ctx.Err() != nil {
			return nil, fmt.Errorf("cannot reach the DHCP keeper: %w", err)
		}
		time.Sleep(5 * time.Millisecond)
	}
}
