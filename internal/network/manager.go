package network

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base32"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/network/bridge"
	"github.com/cloudos-io/cloudos/internal/network/cni"
	"github.com/cloudos-io/cloudos/internal/network/dhcp"
	"github.com/cloudos-io/cloudos/internal/network/ipam"
	"github.com/cloudos-io/cloudos/internal/network/nft"
	"github.com/cloudos-io/cloudos/internal/network/relay"
	"github.com/cloudos-io/cloudos/internal/plugin"
	"github.com/moby/moby/api/types/network"
)

// Config makes a Manager.
type Config struct {
	// Root holds durable records, RunRoot those that die with the kernel.
	Root, RunRoot string
	// Instance tells several engines on one host apart. It is part of the name
	// of every link and table, directly or as a hash.
	Instance string
	Logger   *slog.Logger

	// DefaultPools are cut into subnets for networks that name none; nil means
	// ipam.DefaultBlocks.
	DefaultPools []ipam.Block
	// Subnet of the default network; the zero prefix takes a free one.
	Subnet netip.Prefix
	// IPv6 is "auto" (or ""): on where the host has a global IPv6 address;
	// "on" or "off". A network that says so itself has its way.
	IPv6 string
	// BridgeName of the default network; "" makes one from the instance.
	BridgeName string
	// MTU of networks that name none; 0 takes that of the host's uplink, at
	// most 1500.
	MTU int
	// HostPorts tells how an engine in a network namespace of its own (rootless)
	// comes by ports of the host; the zero value is an engine in the host's.
	HostPorts HostPorts
	// Relay opens the program that carries connections over IPv6 where the
	// kernel cannot translate them (package relay); nil: they are not.
	Relay func() (*os.File, error)
	// Plugins are Docker's, for network and address drivers; nil: there are none.
	Plugins *plugin.Set
	// CNI runs plugins for the networks cni:NAME; nil: there are none.
	CNI *cni.Service
	// Ready is when the kernel has what networks are made of; nil: it has.
	Ready <-chan struct{}
}

// Manager keeps the networks of an engine. It is safe for concurrent use.
type Manager struct {
	cfg   Config
	log   *slog.Logger
	tag   string
	disk  disk
	links *bridge.Links
	table *nft.Table
	host  *hostState
	ports *reservations
	// relay is nil where IPv6 or the program is missing.
	relay *relay.Relay
	// consents are our accepts in the host's own firewall.
	consents *consents
	// broken says why bridge networks cannot work on this host, nil if they can.
	broken error
	six    bool

	serial atomic.Uint64
	kick   chan struct{} // wakes Run's reaper
	// balance wakes who tells containers which others serve; touched are the
	// networks where that changed.
	balance chan struct{}
	touched map[string]bool
	// keeper renews leases; leases wakes who looks after them.
	keeper    *dhcp.Keeper
	leases    chan struct{}
	later     sync.WaitGroup // of what nobody waits for but Close
	raising   raising
	serviceMu sync.Mutex // one service address is given at a time

	cniSeen uint64 // generation of the CNI configuration that the books follow

	// makeMu serialises what creates and removes networks, so that subnets
	// and names are chosen one at a time.
	makeMu sync.Mutex

	// reaping is held from taking an endpoint out of dying until its addresses
	// are free, and comes before mu.
	reaping sync.Mutex

	mu         sync.RWMutex
	nets       map[string]*netw
	names      map[string]*netw
	containers map[string]*box
	parked     map[string]*parked
	dying      []*corpse
	closed     bool
}

// netw is a network in memory.
type netw struct {
	rec   *netRecord
	pool4 []*ipam.Pool
	pool6 []*ipam.Pool
	gw4   netip.Addr
	gw6   netip.Addr
	opts  options
	index int // of the bridge, 0 if there is none
	eps   map[string]*endpoint
	dns   map[string][]*endpoint // by lower-case name
	addrs map[netip.Addr]*endpoint
	// giveBack tells a plugin that manages the addresses that one is free.
	giveBack func(netip.Addr)
}

// box is what is known of a container.
type box struct {
	id, name  string
	unhealthy bool
	eps       map[string]*endpoint
	netns     *os.File
	// gw4 and gw6 are the networks that the default routes lead to.
	gw4, gw6 string
	resolver *resolver
	// services translates service addresses in the namespace; seen is what it
	// was told.
	serviceMu sync.Mutex
	services  *nft.Services
	seen      []nft.Service
	spreadSet bool
	busy      sync.Mutex // one change of routes or names at a time
}

// parked is a link that was prepared and not yet used.
type parked struct {
	net   *netw
	index int
	ip4   netip.Addr
	ip6   netip.Addr
	mac   net.HardwareAddr
}

// corpse is what is left to do for an endpoint that was released.
type corpse struct {
	outer string
	index int
	net   *netw
	addrs []netip.Addr
	udp   bool
	tries int
	// shaped: a device beside the link goes, too.
	shaped bool
}

// instanceChars are what an instance's name is made of.
const instanceChars = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_-"

// New takes up the networks of an engine: it reads their records. Bridges and rules come
// into place when Run begins, or with the first call that needs them. A host that cannot have bridge
// networks still gets a Manager; creating or using one then says why.
func New(ctx context.Context, cfg Config) (*Manager, error) {
	if cfg.Instance == "" || len(cfg.Instance) > 64 || strings.Trim(cfg.Instance, instanceChars) != "" {
		return nil, fault.New(fault.Invalid, "cannot use %q as an instance id: letters, digits, - and _ are allowed, 64 at most", cfg.Instance)
	}
	switch cfg.IPv6 {
	case "", "auto", "on", "off":
	default:
		return nil, fault.New(fault.Invalid, "cannot use %q as the IPv6 setting: auto, on and off are allowed", cfg.IPv6)
	}
	if cfg.DefaultPools == nil {
		cfg.DefaultPools = ipam.DefaultBlocks()
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	m := &Manager{
		cfg: cfg, log: cfg.Logger, tag: tagOf(cfg.Instance), kick: make(chan struct{}, 1), balance: make(chan struct{}, 1),
		nets: map[string]*netw{}, names: map[string]*netw{}, containers: map[string]*box{}, parked: map[string]*parked{},
		ports:   newReservations(cfg.HostPorts),
		raising: raising{quit: make(chan struct{})},
	}
	var seed [8]byte
	rand.Read(seed[:])
	m.serial.Store(binary.NativeEndian.Uint64(seed[:]))
	var err error
	if m.disk, err = newDisk(cfg.Root, cfg.RunRoot); err != nil {
		return nil, err
	}
	m.keeper, m.leases = m.newKeeper(), make(chan struct{}, 1)
	m.host = newHostState(cfg.RunRoot, m.tag)
	m.consents = newConsents(cfg.Root)
	if m.links, err = bridge.New(); err != nil {
		return nil, err
	}
	_, err = bridge.Sysctl("net/ipv6/conf/all/disable_ipv6")
	m.six = err == nil && cfg.IPv6 != "off"
	if m.six && cfg.Relay != nil && !cfg.HostPorts.Listen && cfg.HostPorts.Forward == nil && bridge.HasLoopback6() {
		m.relay = relay.New(relay.Config{Dir: cfg.RunRoot, Program: cfg.Relay, Lost: func(err error) {
			m.log.Error("published ports are not reachable at ::1: the relay ended", "cause", err)
		}})
		m.ports.answered = m.relayed
	}
	m.table = nft.New("servin_"+cfg.Instance, m.six)
	m.load()
	if err := m.ensureBuiltin(ctx, network.NetworkHost, network.NetworkNone); err != nil {
		m.links.Close()
		m.table.Close()
		return nil, err
	}
	return m, nil
}

// Close gives up what only a running engine needs: sockets and descriptors.
// Links and rules stay for the containers that go on.
func (m *Manager) Close() error {
	m.raising.never()
	m.mu.Lock()
	m.closed = true
	boxes := m.containers
	m.containers = map[string]*box{}
	m.mu.Unlock()
	for _, b := range boxes {
		b.close()
	}
	m.later.Wait()
	if m.relay != nil {
		m.relay.Close()
	}
	m.ports.closeAll()
	m.table.Close()
	m.links.Close()
	return nil
}

// tagOf is the five characters by which an instance's links are known.
func tagOf(instance string) string {
	h := sha256.Sum256([]byte(instance))
	return strings.ToLower(base32.StdEncoding.EncodeToString(h[:])[:5])
}

// vethPrefix begins the names of all links but user-defined bridges.
func (m *Manager) vethPrefix() string { return "sv" + m.tag }

// bridgePrefix begins the names of the bridges of user-defined networks.
func (m *Manager) bridgePrefix() string { return "br" + m.tag }

func (m *Manager) newVeth() string {
	n := m.serial.Add(1)
	var b [8]byte
	binary.BigEndian.PutUint64(b[:], n<<29) // 35 bits, 7 characters
	return m.vethPrefix() + "v" + strings.ToLower(base32.StdEncoding.EncodeToString(b[:])[:7])
}

func newID() string {
	var b [32]byte
	rand.Read(b[:])
	return hex.EncodeToString(b[:])
}

// setUp prepares the host: forwarding, the injection pair and the rules.
func (m *Manager) setUp(ctx context.Context) error {
	if err := m.table.Probe(); err == nil {
		if err := m.setUpInjection(); err != nil {
			return err
		}
	} else if errors.Is(err, os.ErrPermission) {
		return fmt.Errorf("cannot use nftables: %w", err)
	} else {
		m.log.Warn("published ports need --publish-through", "cause", err)
	}
	for _, n := range m.nets {
		if n.rec.lan() {
			if err := m.raiseParent(n.rec); err != nil {
				m.log.Error("a network could not be brought up", "network", n.rec.Name, "cause", err)
			}
		}
		if n.rec.Driver != "bridge" || n.rec.ConfigOnly {
			continue
		}
		if err := m.raise(n); err != nil {
			// One network that cannot come up is not the end of the others.
			m.log.Error("a network could not be brought up", "network", n.rec.Name, "cause", err)
		}
	}
	// Ports of containers that were running go on at once; Restore finds out
	// which of them still are.
	for _, b := range m.containers {
		for _, e := range b.eps {
			if err := m.table.AddPorts(m.rules(e.Ports)); err != nil {
				m.log.Error("published ports could not be taken back", "container", b.id, "cause", err)
			}
		}
	}
	return m.table.Sync()
}

// injectMark is set on injected packets where the host filters reverse paths
// strictly. It must be unlike the marks of other programs, which use low bits
// or well-known numbers.
const injectMark, injectTable = 0x5e471a00, 0x5e471a

// injectIDs are this engine's packet mark and routing table.
func (m *Manager) injectIDs() (mark uint32, table int) {
	h := sha256.Sum256([]byte(m.tag))
	return injectMark | uint32(h[4]), injectTable<<8 | int(h[4])
}

func (m *Manager) setUpInjection() error {
	h := sha256.Sum256([]byte(m.tag))
	i, err := bridge.EnsureInjection(m.vethPrefix()+"i0", m.vethPrefix()+"i1", binary.BigEndian.Uint32(h[:]), m.six)
	if err != nil {
		return err
	}
	m.links.Settle(i.Out)
	m.links.Settle(i.In)
	in := &nft.Injection{Out: i.Out, In: i.In, OutIndex: i.OutIndex, To4: i.To4, To6: i.To6}
	mark, table := m.injectIDs()
	if v, err := bridge.Sysctl("net/ipv4/conf/all/rp_filter"); err == nil && v == "1" {
		if err := bridge.LoosenReverse(i.Out, i.In, mark, table); err != nil {
			return err
		}
		in.Mark = mark
	}
	m.table.SetInjection(in)
	return nil
}

// raise makes a bridge network's device and tells the rules about it. It is
// idempotent.
func (m *Manager) raise(n *netw) error {
	six := len(n.pool6) > 0
	if err := m.host.forward(len(n.pool4) > 0, six); err != nil {
		return err
	}
	spec := bridge.Spec{Name: n.rec.Link, MTU: n.rec.MTU, MAC: n.rec.MAC}
	if n.gw4.IsValid() && len(n.pool4) > 0 && !n.opts.noAddress4 {
		spec.Addrs = append(spec.Addrs, netip.PrefixFrom(n.gw4, n.pool4[0].Subnet().Bits()))
	}
	if n.gw6.IsValid() && six && !n.opts.noAddress6 {
		spec.Addrs = append(spec.Addrs, netip.PrefixFrom(n.gw6, n.pool6[0].Subnet().Bits()))
	}
	if _, err := m.links.Ensure(spec); err != nil {
		return err
	}
	if n.index = m.links.Index(n.rec.Link); n.index == 0 {
		return fmt.Errorf("cannot find link %s", n.rec.Link)
	}
	// So that the host reaches its published ports at 127.0.0.1; the rules
	// drop what others send there.
	if len(n.pool4) > 0 {
		if err := bridge.SetSysctl("net/ipv4/conf/"+n.rec.Link+"/route_localnet", "1"); err != nil {
			return err
		}
	}
	return m.table.AddBridge(n.bridge())
}

func (n *netw) bridge() nft.Bridge {
	b := nft.Bridge{
		Name: n.rec.Link, Internal: n.rec.Internal, Isolated: n.opts.noICC,
		NoMasquerade4: n.opts.noMasquerade || n.opts.mode4 == modeRouted,
		NoMasquerade6: n.opts.noMasquerade || n.opts.mode6 == modeRouted,
		Open4:         n.opts.mode4 == modeUnprotected, Open6: n.opts.mode6 == modeUnprotected,
	}
	for _, p := range append(n.pool4[:len(n.pool4):len(n.pool4)], n.pool6...) {
		b.Subnets = append(b.Subnets, p.Subnet())
	}
	return b
}

// load fills the books from disk. Nothing here touches the kernel.
func (m *Manager) load() {
	recs, bad := m.disk.loadNetworks()
	for _, r := range recs {
		n, err := newNetw(r)
		if err != nil {
			bad = append(bad, fmt.Errorf("cannot take up network %s: %w", r.Name, err))
			continue
		}
		m.managed(n)
		m.nets[r.ID], m.names[r.Name] = n, n
	}
	eps, more := m.disk.loadEndpoints()
	for _, e := range eps {
		n := m.nets[e.NetworkID]
		if n == nil {
			continue
		}
		for _, a := range []netip.Addr{e.IPv4, e.IPv6} {
			if a.IsValid() {
				_ = n.take(a)
			}
		}
		b := m.containers[e.ContainerID]
		if b == nil {
			b = &box{id: e.ContainerID, name: e.ContainerName, eps: map[string]*endpoint{}}
			m.containers[e.ContainerID] = b
		}
		m.register(n, b, e)
	}
	for _, err := range append(bad, more...) {
		m.log.Error("a network record is damaged", "cause", err)
	}
}

// newNetw builds the pools of a record.
func newNetw(r *netRecord) (*netw, error) {
	n := &netw{rec: r, eps: map[string]*endpoint{}, dns: map[string][]*endpoint{}, addrs: map[netip.Addr]*endpoint{}}
	var err error
	if n.opts, err = parseOptions(r.Options, r.Internal); err != nil {
		return nil, err
	}
	if r.ConfigOnly {
		return n, nil
	}
	for _, c := range r.IPAM.Config {
		if !c.Subnet.IsValid() {
			continue
		}
		p, err := ipam.NewPool(c.Subnet, c.IPRange)
		if err != nil {
			return nil, err
		}
		four := c.Subnet.Addr().Is4()
		if c.Gateway.IsValid() {
			if err := p.Take(c.Gateway); err != nil {
				return nil, fmt.Errorf("gateway %s: %w", c.Gateway, err)
			}
		}
		for k, a := range c.AuxAddress {
			if err := p.Take(a); err != nil {
				return nil, fmt.Errorf("auxiliary address %s=%s: %w", k, a, err)
			}
		}
		if four {
			if len(n.pool4) == 0 {
				n.gw4 = c.Gateway
			}
			n.pool4 = append(n.pool4, p)
		} else {
			if len(n.pool6) == 0 {
				n.gw6 = c.Gateway
			}
			n.pool6 = append(n.pool6, p)
		}
	}
	for _, s := range r.Services {
		for _, a := range []netip.Addr{s.IPv4, s.IPv6} {
			if a.IsValid() {
				_ = n.take(a)
			}
		}
	}
	return n, nil
}

// take reserves a given address in whichever pool has it.
func (n *netw) take(a netip.Addr) error {
	err := ipam.ErrOutside
	for _, p := range n.pools(a.Unmap().Is4()) {
		if err = p.Take(a); !errors.Is(err, ipam.ErrOutside) {
			return err
		}
	}
	return err
}

func (n *netw) pools(four bool) []*ipam.Pool {
	if four {
		return n.pool4
	}
	return n.pool6
}

func (n *netw) free(addrs ...netip.Addr) {
	for _, a := range addrs {
		if !a.IsValid() {
			continue
		}
		for _, p := range n.pools(a.Is4()) {
			if p.Subnet().Contains(a) {
				p.Free(a)
			}
		}
		if n.giveBack != nil {
			n.giveBack(a)
		}
	}
}

// find looks a network up by name, id or unique id prefix.
func (m *Manager) find(ref string) (*netw, error) {
	m.followCNI()
	m.mu.RLock()
	defer m.mu.RUnlock()
	return m.findLocked(ref)
}

func (m *Manager) findLocked(ref string) (*netw, error) {
	if n := m.nets[ref]; n != nil {
		return n, nil
	}
	if ref == "default" {
		ref = network.NetworkBridge
	}
	if n := m.names[ref]; n != nil {
		return n, nil
	}
	var hit *netw
	if ref != "" {
		for id, n := range m.nets {
			if strings.HasPrefix(id, ref) {
				if hit != nil {
					return nil, fault.New(fault.Invalid, "network %s is ambiguous: give more of its id", ref)
				}
				hit = n
			}
		}
	}
	if hit == nil {
		if name, ok := strings.CutPrefix(ref, cniPrefix); ok && m.cfg.CNI != nil {
			if _, err := m.cfg.CNI.Network(name); err != nil {
				return nil, err // it says where was looked, and why a file does not count
			}
		}
		return nil, fault.New(fault.NotFound, "network %s not found", ref)
	}
	return hit, nil
}

func (b *box) close() {
	if b.resolver != nil {
		b.resolver.close()
		b.resolver = nil
	}
	b.serviceMu.Lock()
	if b.services != nil {
		b.services.Close()
		b.services, b.seen, b.spreadSet = nil, nil, false
	}
	b.serviceMu.Unlock()
	if b.netns != nil {
		b.netns.Close()
		b.netns = nil
	}
}
