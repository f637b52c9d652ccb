// Package uplink connects the machine to its networks: links as the configuration
// says (addresses by DHCP or fixed, routes, VLANs, bonds), or, without one, DHCP and
// router advertisements on every Ethernet link that there is or comes. It writes
// resolv.conf. The first process imports it.
package uplink

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/vishvananda/netlink"
)

// Config is the network part of the machine's configuration.
type Config struct {
	// Links by name; empty is DHCP on every Ethernet link.
	Links []Link `yaml:"links"`
	// DNS servers and search domains, before those of DHCP.
	DNS    []netip.Addr `yaml:"dns"`
	Search []string     `yaml:"search"`
}

// Link is one link.
type Link struct {
	// Name of the link, or MAC of it.
	Name string `yaml:"name"`
	MAC  string `yaml:"mac"`
	// DHCP asks for an address (default true where there are no addresses).
	DHCP *bool `yaml:"dhcp"`
	// Addresses with their prefix length.
	Addresses []netip.Prefix `yaml:"addresses"`
	Gateway   netip.Addr     `yaml:"gateway"`
	Routes    []Route        `yaml:"routes"`
	MTU       int            `yaml:"mtu"`
	// VLAN makes the link a VLAN of another; Bond makes it a bond of others.
	VLAN *VLAN `yaml:"vlan"`
	Bond *Bond `yaml:"bond"`
}

// Route is a further route.
type Route struct {
	To  netip.Prefix `yaml:"to"`
	Via netip.Addr   `yaml:"via"`
}

// VLAN is an 802.1Q link.
type VLAN struct {
	Parent string `yaml:"parent"`
	ID     int    `yaml:"id"`
}

// Bond joins links.
type Bond struct {
	// Mode is active-backup (default), 802.3ad, balance-rr, balance-xor, broadcast, balance-tlb or balance-alb.
	Mode    string   `yaml:"mode"`
	Members []string `yaml:"members"`
}

func (l *Link) dhcp() bool {
	if l.DHCP != nil {
		return *l.DHCP
	}
	return len(l.Addresses) == 0
}

// State is what became of a link.
type State struct {
	Name, MAC string
	Up        bool
	Addresses []string
	Gateway   string
	DNS       []string
	Problem   string
}

// Net is the machine's network.
type Net struct {
	cfg      Config
	hostname string
	resolv   string
	log      func(format string, args ...any)
	changed  func()

	mu    sync.Mutex
	links map[string]*link
	// failure is why a link could not be set up, when it was last tried.
	failure map[string]string
	online  chan struct{}
	once    sync.Once
}

type link struct {
	cfg     Link
	lease   *lease
	routers announced
	told    announced     // by DHCPv6
	more    chan struct{} // a router said that DHCPv6 knows more
	problem string
	index   int // the kernel's of the device; 0 until it is set up
	failed  bool
	stop    context.CancelFunc
	done    chan struct{} // closed when nobody keeps it any more
}

// Options of New.
type Options struct {
	Config   Config
	Hostname string
	// Resolv is the file that name servers are written to.
	Resolv string
	Log    func(format string, args ...any)
	// Changed is called when something of State changed.
	Changed func()
}

// New returns a network that Run brings up.
func New(o Options) *Net {
	return &Net{cfg: o.Config, hostname: o.Hostname, resolv: o.Resolv, log: o.Log, changed: o.Changed, links: map[string]*link{}, failure: map[string]string{}, online: make(chan struct{})}
}

// Online is closed once some link has an address.
func (n *Net) Online() <-chan struct{} { return n.online }

// Loopback brings lo up.
func Loopback() error {
	lo, err := netlink.LinkByName("lo")
	if err != nil {
		return err
	}
	return netlink.LinkSetUp(lo)
}

// Run brings links up, and those that come later, until ctx is done; come gets a
// value when links came.
func (n *Net) Run(ctx context.Context, come <-chan struct{}) {
	var wg sync.WaitGroup
	defer wg.Wait()
	if err := n.writeResolv(); err != nil {
		n.log("%v", err)
	}
	hearing := make(chan struct{})
	wg.Go(func() {
		if err := n.heed(ctx, hearing); err != nil {
			n.log("%v", err)
		}
	})
	<-hearing
	for {
		n.forget()
		for _, l := range n.due() {
			ctx, stop := context.WithCancel(ctx)
			k := &link{cfg: l, stop: stop, done: make(chan struct{}), more: make(chan struct{}, 1)}
			n.mu.Lock()
			n.links[l.Name] = k
			n.mu.Unlock()
			wg.Go(func() {
				defer close(k.done)
				defer stop()
				n.keep(ctx, l)
			})
			if l.dhcp() && len(n.cfg.DNS) == 0 {
				wg.Go(func() { n.inform(ctx, l.Name, k) })
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-come:
		}
	}
}

// forget lets go of links whose device went, which may have come back as another, and of those that could not be
// set up: they are due again. Members that came back join their bond.
func (n *Net) forget() {
	gone, bonds := map[string]*link{}, []*link(nil)
	n.mu.Lock()
	for name, l := range n.links {
		switch {
		case l.failed, l.index > 0 && sysfs(name, "ifindex") != strconv.Itoa(l.index):
			gone[name] = l
		case l.index > 0 && l.cfg.Bond != nil:
			bonds = append(bonds, l)
		}
	}
	n.mu.Unlock()
	// Whoever keeps one still speaks of it: it is known until they have ended.
	for name, l := range gone {
		l.stop()
		<-l.done
		n.mu.Lock()
		delete(n.links, name)
		n.mu.Unlock()
	}
	if len(gone) > 0 {
		if err := n.writeResolv(); err != nil {
			n.log("%v", err)
		}
	}
	for _, l := range bonds {
		if dev, err := netlink.LinkByName(l.cfg.Name); err == nil {
			for _, m := range l.cfg.Bond.Members {
				if err := join(dev, m); err != nil && !errors.As(err, new(netlink.LinkNotFoundError)) {
					n.log("cannot set the link %s up: %v", l.cfg.Name, err)
				}
			}
		}
	}
}

// Release takes back what DHCP gave, once Run has ended: another configuration comes into its place.
func (n *Net) Release() {
	n.mu.Lock()
	links := slices.Collect(maps.Values(n.links))
	n.mu.Unlock()
	for _, l := range links {
		if l.lease != nil {
			n.remove(l.cfg, l.lease)
		}
	}
}

// due lists the links that are there, or can be made, and are not ours yet.
func (n *Net) due() []Link {
	names, err := os.ReadDir("/sys/class/net")
	if err != nil {
		n.log("cannot list links: %v", err)
		return nil
	}
	here := map[string]string{}
	for _, d := range names {
		here[d.Name()] = sysfs(d.Name(), "address")
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	var out []Link
	if len(n.cfg.Links) == 0 {
		for name := range here {
			if n.links[name] == nil && ethernet(name) {
				out = append(out, Link{Name: name})
			}
		}
		return out
	}
	for _, l := range n.cfg.Links {
		if l.Name == "" {
			for name, mac := range here {
				if strings.EqualFold(mac, l.MAC) && ethernet(name) {
					l.Name = name
				}
			}
		}
		if l.Name == "" || n.links[l.Name] != nil {
			continue
		}
		_, there := here[l.Name]
		switch {
		case l.VLAN != nil:
			_, there = here[l.VLAN.Parent]
		case l.Bond != nil:
			there = !slices.ContainsFunc(l.Bond.Members, func(m string) bool { _, ok := here[m]; return !ok })
		}
		if there {
			out = append(out, l)
		}
	}
	return out
}

func sysfs(name, attr string) string {
	b, err := os.ReadFile(filepath.Join("/sys/class/net", name, attr))
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(b))
}

// ethernet tells a card of the machine from links that software made.
func ethernet(name string) bool {
	if _, err := os.Stat(filepath.Join("/sys/class/net", name, "device")); err != nil {
		return false
	}
	return sysfs(name, "type") == "1"
}

// keep brings a link up and holds its lease until ctx is done.
func (n *Net) keep(ctx context.Context, l Link) {
	if err := n.set(l); err != nil {
		n.problem(l.Name, err)
		n.mu.Lock()
		n.links[l.Name].failed = true
		again := n.failure[l.Name] == err.Error()
		n.failure[l.Name] = err.Error()
		n.mu.Unlock()
		if !again { // it is tried whenever a device comes
			n.log("%v", err)
		}
		return
	}
	n.note(l.Name)
	if !l.dhcp() {
		return
	}
	wait := time.Second
	for ctx.Err() == nil {
		got, err := acquire(ctx, l.Name, n.hostname, nil)
		if err != nil {
			n.problem(l.Name, fmt.Errorf("no DHCP server answered: %w", err))
			n.alone(l.Name)
			select {
			case <-ctx.Done():
			case <-time.After(wait):
			}
			wait = min(2*wait, time.Minute)
			continue
		}
		wait = time.Second
		n.hold(ctx, l, got)
	}
}

// alone takes a link for connected that router advertisements gave an address, where there is no DHCP.
func (n *Net) alone(name string) {
	ifi, err := net.InterfaceByName(name)
	if err != nil {
		return
	}
	addrs, err := ifi.Addrs()
	if err != nil {
		return
	}
	for _, a := range addrs {
		if p, err := netip.ParsePrefix(a.String()); err == nil && p.Addr().Is6() && p.Addr().IsGlobalUnicast() {
			n.once.Do(func() { close(n.online) })
		}
	}
}

// hold applies a lease and renews it until it is over.
func (n *Net) hold(ctx context.Context, l Link, got *lease) {
	for {
		since := time.Now()
		if err := n.apply(l, got); err != nil {
			n.problem(l.Name, err)
			n.log("%v", err)
		}
		next := got.Renew
		for {
			select {
			case <-ctx.Done():
				return
			case <-time.After(next):
			}
			again, err := acquire(ctx, l.Name, n.hostname, got.raw)
			if err == nil {
				if again.Addr != got.Addr {
					n.remove(l, got)
				}
				got = again
				break
			}
			left := got.End - time.Since(since)
			if left <= 0 {
				n.remove(l, got)
				n.problem(l.Name, errors.New("the lease is over and no DHCP server renewed it"))
				return
			}
			next = min(max(left/2, 10*time.Second), left+time.Second)
		}
	}
}

func (n *Net) apply(l Link, got *lease) error {
	dev, err := netlink.LinkByName(l.Name)
	if err != nil {
		return err
	}
	secs := int(got.End / time.Second)
	if err := netlink.AddrReplace(dev, &netlink.Addr{IPNet: ipnet(got.Addr, false), ValidLft: secs, PreferedLft: secs}); err != nil {
		return fmt.Errorf("cannot give %s the address %s: %w", l.Name, got.Addr, err)
	}
	if got.MTU > 0 && l.MTU == 0 {
		if err := netlink.LinkSetMTU(dev, got.MTU); err != nil {
			n.log("cannot give %s the MTU %d that DHCP says: %v", l.Name, got.MTU, err)
		}
	}
	routes := got.Routes
	if got.Gateway.IsValid() && !l.Gateway.IsValid() {
		routes = append(slices.Clone(routes), Route{Via: got.Gateway})
	}
	if err := n.route(dev, routes, leased); err != nil {
		return err
	}
	n.mu.Lock()
	n.links[l.Name].lease, n.links[l.Name].problem = got, ""
	n.mu.Unlock()
	if err := n.writeResolv(); err != nil {
		return err
	}
	n.log("%s has %s", l.Name, got.Addr)
	n.note(l.Name)
	return nil
}

// remove takes a lease back, and its routes, which the kernel leaves where the link has another address.
func (n *Net) remove(l Link, got *lease) {
	if dev, err := netlink.LinkByName(l.Name); err == nil {
		routes, _ := netlink.RouteList(dev, netlink.FAMILY_V4)
		for _, r := range routes {
			if r.Priority == leased {
				netlink.RouteDel(&r)
			}
		}
		netlink.AddrDel(dev, &netlink.Addr{IPNet: ipnet(got.Addr, false)})
	}
	n.mu.Lock()
	n.links[l.Name].lease = nil
	n.mu.Unlock()
}

func (n *Net) problem(name string, err error) {
	n.mu.Lock()
	n.links[name].problem = err.Error()
	n.mu.Unlock()
	n.changed()
}

func (n *Net) note(name string) {
	n.mu.Lock()
	l := n.links[name]
	has := l.lease != nil || len(l.cfg.Addresses) > 0
	n.mu.Unlock()
	if has {
		n.once.Do(func() { close(n.online) })
	}
	n.changed()
}

// TimeServers are those that DHCP named.
func (n *Net) TimeServers() []netip.Addr {
	n.mu.Lock()
	defer n.mu.Unlock()
	var out []netip.Addr
	for _, l := range n.links {
		if l.lease != nil {
			out = append(out, l.lease.NTP...)
		}
	}
	return out
}

// States tells about all links of ours, by name.
func (n *Net) States() []State {
	n.mu.Lock()
	defer n.mu.Unlock()
	var out []State
	for name, l := range n.links {
		s := State{Name: name, MAC: sysfs(name, "address"), Up: sysfs(name, "operstate") == "up", Problem: l.problem}
		if ifi, err := net.InterfaceByName(name); err == nil {
			addrs, _ := ifi.Addrs()
			for _, a := range addrs {
				s.Addresses = append(s.Addresses, a.String())
			}
		}
		if l.cfg.Gateway.IsValid() {
			s.Gateway = l.cfg.Gateway.String()
		}
		if len(n.cfg.DNS) == 0 {
			servers, _ := l.announced(name)
			for _, d := range servers {
				s.DNS = append(s.DNS, d.String())
			}
		}
		if l.lease != nil {
			if l.lease.Gateway.IsValid() && s.Gateway == "" {
				s.Gateway = l.lease.Gateway.String()
			}
			for _, d := range l.lease.DNS {
				s.DNS = append(s.DNS, d.String())
			}
		}
		out = append(out, s)
	}
	slices.SortFunc(out, func(a, b State) int { return strings.Compare(a.Name, b.Name) })
	return out
}
