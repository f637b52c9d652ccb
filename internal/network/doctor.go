package network

import (
	"context"
	"fmt"
	"net/netip"
	"slices"
	"strings"

	"github.com/cloudos-io/cloudos/internal/network/bridge"
	"github.com/cloudos-io/cloudos/internal/network/nft"
)

// Severities of a Finding.
const (
	sevInfo    = "info"
	sevWarning = "warning"
	sevError   = "error"
)

// Doctor looks at the host's firewall and forwarding, and changes nothing.
func (m *Manager) Doctor(ctx context.Context) []Finding {
	m.up()
	var out []Finding
	add := func(sev, title, detail, fix string) {
		out = append(out, Finding{Severity: sev, Title: title, Detail: detail, Fix: fix})
	}
	if m.broken != nil {
		add(sevError, "bridge networks are off", m.broken.Error(), "give the engine CAP_NET_ADMIN and a kernel with bridge, veth and nf_tables")
		return out
	}
	if err := m.table.Probe(); err != nil {
		add(sevWarning, "published ports need --publish-through", err.Error(), "load the kernel module nft_dup_ipv4, or build the kernel with CONFIG_NFT_DUP_IPV4")
	}
	if v, err := bridge.Sysctl("net/ipv4/ip_forward"); err == nil && v != "1" {
		add(sevError, "IPv4 forwarding is off", "containers reach nothing outside their network", "sysctl -w net.ipv4.ip_forward=1")
	}
	if m.uses6() {
		if v, err := bridge.Sysctl("net/ipv6/conf/all/forwarding"); err == nil && v != "1" {
			add(sevError, "IPv6 forwarding is off", "containers reach nothing outside their network over IPv6", "sysctl -w net.ipv6.conf.all.forwarding=1")
		}
	}
	if v, err := bridge.Sysctl("net/ipv4/conf/all/rp_filter"); err == nil && v == "1" && !m.table.Marks() {
		add(sevError, "strict reverse-path filtering came on after the engine started", "first packets to published ports are dropped", "restart the engine, which adapts to it, or set net.ipv4.conf.all.rp_filter=2")
	}
	for _, c := range m.collisions() {
		add(sevError, "two links have the same addresses", fmt.Sprintf("network %s has %s, and %s is another link's by now: packets to its containers go astray", c.network, c.subnet, c.other),
			"remove the network and create it again with another --subnet (for the network bridge: another subnet in the engine's configuration), or take the other link's addresses away")
	}
	host, err := nft.Inspect(m.table.Name())
	if err != nil {
		add(sevWarning, "the host's firewall cannot be read", err.Error(), "")
		return out
	}
	for _, d := range m.drops(host) {
		out = append(out, Finding{Severity: sevError, Title: "the host's firewall drops forwarded packets",
			Detail: fmt.Sprintf("%s drops what no rule of it accepts, so that containers on %s reach nothing outside, or published ports do not reach them", d.place, strings.Join(d.links, ", ")),
			Fix:    "servin system doctor --fix, or by hand: " + d.fix, Action: d.action()})
	}
	if host.OutputDrops != "" {
		add(sevWarning, "the host's firewall drops what the host sends", fmt.Sprintf("%s has the policy drop: the engine passes first packets to published ports out of %si0, which must be accepted there", host.OutputDrops, m.vethPrefix()),
			fmt.Sprintf("nft insert rule %s oifname %si0 accept", host.OutputDrops, m.vethPrefix()))
	}
	if host.Legacy {
		add(sevInfo, "the host uses iptables-legacy", "its rules are not visible here; if its FORWARD chain drops, containers have no network", "iptables-legacy -S FORWARD")
	}
	if host.Firewalld && m.uses6() {
		add(sevInfo, "firewalld may filter IPv6 reverse paths", "with IPv6_rpfilter=yes it drops first packets to ports published over IPv6", "set IPv6_rpfilter=no in /etc/firewalld/firewalld.conf")
	}
	return out
}

// collision is a network whose addresses another link of the host has, too.
type collision struct {
	network       string
	subnet, other netip.Prefix
}

// collisions finds what came after a network was made, for a new one avoids what
// is there: a VPN, another engine. A route that is wider than the subnet takes
// nothing from it.
func (m *Manager) collisions() (out []collision) {
	busy, err := bridge.Busy(m.ourLinks())
	if err != nil {
		m.log.Warn("cannot compare networks with the host's routes", "cause", err)
		return nil
	}
	m.mu.RLock()
	defer m.mu.RUnlock()
	for _, n := range m.nets {
		if n.rec.Driver != "bridge" || n.rec.ConfigOnly {
			continue
		}
		for _, c := range n.rec.IPAM.Config {
			if i := slices.IndexFunc(busy, func(p netip.Prefix) bool { return p.Overlaps(c.Subnet) && p.Bits() >= c.Subnet.Bits() }); i >= 0 {
				out = append(out, collision{n.rec.Name, c.Subnet, busy[i]})
			}
		}
	}
	slices.SortFunc(out, func(a, b collision) int { return strings.Compare(a.network, b.network) })
	return out
}

func (m *Manager) uses6() bool {
	m.mu.RLock()
	defer m.mu.RUnlock()
	for _, n := range m.nets {
		if n.rec.Driver == "bridge" && len(n.pool6) > 0 {
			return true
		}
	}
	return false
}

// drop is a place of the host's that drops forwarded packets of ours.
type drop struct {
	place, fix string
	links      []string
	chain      nft.Chain
}

// action says what AllowForward does about it. It names the place and all
// links, so that consent to it is consent to nothing else.
func (d drop) action() string {
	return fmt.Sprintf("let %s accept what is forwarded from and to %s: %s", d.place, strings.Join(d.links, ", "), d.fix)
}

// nowhere is a link that no rule names: what a host without a default route
// would send by.
const nowhere = "\x00"

// drops finds where FORWARD drops what goes from our bridges to the outside,
// or the first packets to published ports.
func (m *Manager) drops(host nft.Host) (out []drop) {
	links := m.forwarding()
	if len(links) == 0 {
		return nil
	}
	uplink, six, tools := bridge.Uplink(), m.uses6(), map[nft.Kind]bool{}
	if uplink == "" {
		uplink = nowhere
	}
	inject := m.vethPrefix() + "i1"
	for _, c := range host.Forward {
		var missing []string
		for _, l := range links {
			if !c.Passes(l, uplink) || !c.Passes(inject, l) {
				missing = append(missing, l)
			}
		}
		if len(missing) == 0 || c.Six() && !six || tools[c.Kind] {
			continue
		}
		d := drop{place: c.String(), links: missing, chain: c}
		switch c.Kind {
		case nft.UFW:
			// One command is for both families.
			tools[c.Kind] = true
			d.place, d.fix = "ufw", script(ufwCommands(missing, false))
		case nft.Firewalld:
			tools[c.Kind] = true
			d.place, d.fix = "firewalld", script(m.zone().commands(missing))
		case nft.Docker:
			d.fix = eachLink(missing, "iptables -I DOCKER-USER -i %[1]s -j ACCEPT; iptables -I DOCKER-USER -o %[1]s -j ACCEPT")
		default:
			d.fix = eachLink(missing, "nft insert rule "+c.Where()+" iifname %[1]s accept; nft insert rule "+c.Where()+" oifname %[1]s accept")
		}
		out = append(out, d)
	}
	return out
}

func eachLink(links []string, format string) string {
	var s []string
	for _, l := range links {
		s = append(s, fmt.Sprintf(format, l))
	}
	return strings.Join(s, "; ")
}

// forwarding names the bridges that forward to the outside.
func (m *Manager) forwarding() (out []string) {
	m.mu.RLock()
	defer m.mu.RUnlock()
	for _, n := range m.nets {
		if n.rec.Link != "" && !n.rec.Internal {
			out = append(out, n.rec.Link)
		}
	}
	slices.Sort(out)
	return out
}

// forwardWarning tells the maker of a network that the host's firewall stands
// in its way.
func (m *Manager) forwardWarning() string {
	host, err := nft.Inspect(m.table.Name())
	if err != nil {
		return ""
	}
	if ds := m.drops(host); len(ds) > 0 {
		return fmt.Sprintf("%s drops forwarded packets: containers on this network reach nothing outside; to let them: servin system doctor --fix, or by hand: %s", ds[0].place, ds[0].fix)
	}
	return ""
}
