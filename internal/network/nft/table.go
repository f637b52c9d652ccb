// Package nft keeps the nftables rules of an engine: one table for IPv4 and
// one for IPv6, whose rules never change. What does change, bridges, subnets
// and published ports, are elements of sets and maps, so that publishing a
// port is one small transaction. Package network imports it.
//
// # Published ports
//
// A packet for a published port is not translated where it arrives. It goes
// on to local delivery and so through every input chain of the host: what the
// host would not let a process of its own receive, a container does not get
// either. Our input chain comes after all of those. It sends a duplicate of a
// connection's first packet into one end of a veth pair (the injection pair)
// and drops the original. The duplicate comes out of the other end without a
// connection-tracking entry, is translated there as usual, and is forwarded
// to the container with the client's address. Later packets match that
// entry and are translated where they arrive.
//
// Ports published through (the user's explicit wish) are translated where
// they arrive.
package nft

import (
	"errors"
	"fmt"
	"net/netip"
	"sync"

	"github.com/google/nftables"
	"github.com/mdlayher/netlink"
	"golang.org/x/sys/unix"
)

// Proto is an IP protocol number with ports.
type Proto uint8

// The protocols whose ports can be published.
const (
	TCP  Proto = unix.IPPROTO_TCP
	UDP  Proto = unix.IPPROTO_UDP
	SCTP Proto = unix.IPPROTO_SCTP
)

// Bridge is what the rules need to know of a network.
type Bridge struct {
	Name    string
	Subnets []netip.Prefix
	// Internal networks reach nothing outside and nothing outside reaches them.
	Internal bool
	// Isolated containers do not reach one another (enable_icc=false).
	Isolated bool
	// NoMasquerade4 and NoMasquerade6 leave source addresses alone.
	NoMasquerade4, NoMasquerade6 bool
	// Open4 and Open6: every port of the containers is reachable from outside
	// (gateway mode nat-unprotected).
	Open4, Open6 bool
}

// Port is one published port of one family.
type Port struct {
	// Host is the host's address, unspecified for all of the family.
	Host  netip.Addr
	Proto Proto
	Port  uint16
	// To is the container's address and port.
	To netip.AddrPort
	// Through translates before the host's input rules.
	Through bool
	// Routed opens the container's port to routed traffic and translates
	// nothing; Host and Port are not used.
	Routed bool
}

// Injection names the veth pair that carries first packets round.
type Injection struct {
	// Out is the end that duplicates leave by, In the one they come out of.
	Out, In string
	// OutIndex is the index of Out.
	OutIndex int
	// To4 and To6 are the next hops that duplicates are sent to; To6 is
	// invalid where the host has no IPv6.
	To4, To6 netip.Addr
	// Mark is set on injected packets until they are routed, if not zero.
	Mark uint32
}

// Table is an engine's nftables rules. It is safe for concurrent use.
type Table struct {
	name string
	six  bool

	mu      sync.Mutex
	conn    *nftables.Conn
	pid     uint32
	inject  *Injection
	bridges map[string]Bridge
	ports   map[Port]struct{}
	live    bool
}

// New returns the rules of that name for the namespace of the calling thread.
// Nothing is in the kernel until Sync. six tells whether the host has IPv6.
func New(name string, six bool) *Table {
	return &Table{name: name, six: six, bridges: map[string]Bridge{}, ports: map[Port]struct{}{}}
}

func (t *Table) families() []family {
	if t.six {
		return []family{ip4, ip6}
	}
	return []family{ip4}
}

// dial opens the lasting connection if there is none.
func (t *Table) dial() (*nftables.Conn, error) {
	if t.conn != nil {
		return t.conn, nil
	}
	c, err := nftables.New(nftables.AsLasting(), nftables.WithSockOptions(func(c *netlink.Conn) error {
		raw, err := c.SyscallConn()
		if err != nil {
			return err
		}
		// A transaction of a thousand ports is a large datagram.
		_ = c.SetWriteBuffer(8 << 20)
		_ = c.SetReadBuffer(8 << 20)
		return raw.Control(func(fd uintptr) {
			if sa, err := unix.Getsockname(int(fd)); err == nil {
				if nl, ok := sa.(*unix.SockaddrNetlink); ok {
					t.pid = nl.Pid
				}
			}
		})
	}))
	if err != nil {
		return nil, fmt.Errorf("cannot open nftables: %w", err)
	}
	t.conn = c
	return c, nil
}

// flush commits what is queued. After a failure the connection may hold
// answers nobody asked for any more, so it is dropped.
func (t *Table) flush() error {
	err := t.conn.Flush()
	if err != nil {
		_ = t.conn.CloseLasting()
		t.conn = nil
	}
	return err
}

// Close drops the connection; the rules stay.
func (t *Table) Close() {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.conn != nil {
		_ = t.conn.CloseLasting()
		t.conn = nil
	}
}

// SetInjection names the pair for published ports; nil if the kernel cannot
// duplicate packets. It takes effect with the next Sync.
func (t *Table) SetInjection(i *Injection) {
	t.mu.Lock()
	t.inject = i
	t.mu.Unlock()
}

// Sync writes the whole ruleset in one transaction, replacing what is there.
func (t *Table) Sync() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.sync()
}

func (t *Table) sync() error {
	c, err := t.dial()
	if err != nil {
		return err
	}
	var id uint32
	for _, f := range t.families() {
		tab := &nftables.Table{Name: t.name, Family: f.table}
		// Adding it first makes the deletion succeed in any case.
		c.AddTable(tab)
		c.DelTable(tab)
		c.AddTable(tab)
		if err := t.render(c, tab, f, &id); err != nil {
			return err
		}
	}
	if err := t.flush(); err != nil {
		return fmt.Errorf("cannot write the nftables rules: %w", err)
	}
	t.live = true
	return nil
}

// AddBridge adds a network's bridge to the rules.
func (t *Table) AddBridge(b Bridge) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if old, ok := t.bridges[b.Name]; ok {
		if err := t.changeBridge(old, false); err != nil {
			return err
		}
		delete(t.bridges, b.Name)
	}
	if err := t.changeBridge(b, true); err != nil {
		return err
	}
	t.bridges[b.Name] = b
	return nil
}

// DelBridge removes a bridge from the rules.
func (t *Table) DelBridge(name string) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	b, ok := t.bridges[name]
	if !ok {
		return nil
	}
	delete(t.bridges, name)
	return t.changeBridge(b, false)
}

func (t *Table) changeBridge(b Bridge, add bool) error {
	if !t.live {
		return nil // Sync will write it
	}
	return t.apply(add, func(f family) []change { return f.bridgeElements(b) })
}

// AddPorts publishes ports, all or none.
func (t *Table) AddPorts(ports []Port) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, p := range ports {
		if !p.Through && !p.Routed && t.inject == nil {
			return ErrNoInjection
		}
	}
	if t.live {
		if err := t.apply(true, func(f family) []change { return f.portElements(ports) }); err != nil {
			return err
		}
	}
	for _, p := range ports {
		t.ports[p] = struct{}{}
	}
	return nil
}

// DelPorts takes ports back.
func (t *Table) DelPorts(ports []Port) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	known := ports[:0:0]
	for _, p := range ports {
		if _, ok := t.ports[p]; ok {
			delete(t.ports, p)
			known = append(known, p)
		}
	}
	if !t.live || len(known) == 0 {
		return nil
	}
	return t.apply(false, func(f family) []change { return f.portElements(known) })
}

// ErrNoInjection says that the kernel cannot duplicate packets.
var ErrNoInjection = errors.New("this kernel's nftables cannot duplicate packets (CONFIG_NFT_DUP_IPV4), so that a published port cannot be kept behind the host's input rules; publish through them with --publish-through if that is what you want")

// apply makes one transaction of element changes. If the kernel refuses it,
// its state is not what the books say, because somebody else has been at our
// tables: they are written anew from the books and the change is tried once
// more.
func (t *Table) apply(add bool, of func(family) []change) error {
	n, err := t.queue(add, of)
	if err != nil || n == 0 {
		return err
	}
	if err = t.flush(); err == nil {
		return nil
	}
	if serr := t.sync(); serr != nil {
		return errors.Join(fmt.Errorf("cannot change the nftables rules: %w", err), serr)
	}
	if !add {
		return nil // the books no longer have what was to go
	}
	if _, err := t.queue(add, of); err != nil {
		return err
	}
	if err := t.flush(); err != nil {
		return fmt.Errorf("cannot change the nftables rules: %w", err)
	}
	return nil
}

func (t *Table) queue(add bool, of func(family) []change) (n int, err error) {
	c, err := t.dial()
	if err != nil {
		return 0, err
	}
	for _, f := range t.families() {
		tab := &nftables.Table{Name: t.name, Family: f.table}
		for _, ch := range of(f) {
			for len(ch.elems) > 0 {
				k := min(piece, len(ch.elems))
				s := &nftables.Set{Table: tab, Name: ch.set, IsMap: ch.isMap}
				if add {
					err = c.SetAddElements(s, ch.elems[:k])
				} else {
					err = c.SetDeleteElements(s, ch.elems[:k])
				}
				if err != nil {
					return n, fmt.Errorf("cannot encode nftables elements: %w", err)
				}
				ch.elems = ch.elems[k:]
				n++
			}
		}
	}
	return n, nil
}

// piece is how many elements go in one message: a netlink attribute holds at
// most 64 KiB.
const piece = 400

// Delete removes the tables.
func (t *Table) Delete() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.live = false
	c, err := t.dial()
	if err != nil {
		return err
	}
	for _, f := range t.families() {
		tab := &nftables.Table{Name: t.name, Family: f.table}
		c.AddTable(tab)
		c.DelTable(tab)
	}
	if err := t.flush(); err != nil {
		return fmt.Errorf("cannot remove the nftables rules: %w", err)
	}
	return nil
}

// ifname is a link's name as nftables compares it.
func ifname(s string) []byte {
	b := make([]byte, unix.IFNAMSIZ)
	copy(b, s)
	return b
}

// Name is the tables' name.
func (t *Table) Name() string { return t.name }

// Marks tells whether injected packets are marked for strict reverse-path
// filtering.
func (t *Table) Marks() bool {
	t.mu.Lock()
	defer t.mu.Unlock()
	return t.inject != nil && t.inject.Mark != 0
}
