package uplink

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"net"
	"net/netip"
	"slices"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv6"
	"github.com/vishvananda/netlink/nl"
	"golang.org/x/sys/unix"
)

// Routers may say that more is to be had of a DHCPv6 server (RFC 4861 section 4.2: the flags M and O). It is asked for
// name servers and search domains alone, which takes no lease (RFC 8415 section 6.1).

const (
	// A server says how long what it told holds (RFC 8415 section 21.23); not too short, and no longer than routers may.
	leastRefresh = 10 * time.Minute
	// Times of an information-request (RFC 8415 section 7.6), and how long is waited in all before who failed to answer is asked again.
	firstTimeout, mostTimeout, askingDelay = time.Second, 16 * time.Second, time.Second
	againAfter                             = 10 * time.Minute
)

// inform waits until a router of a link says that there is more, and then asks until ctx is done.
func (n *Net) inform(ctx context.Context, name string, k *link) {
	select {
	case <-ctx.Done():
		return
	case <-k.more:
	}
	n.mu.Lock()
	index := k.index
	n.mu.Unlock()
	ifi, err := net.InterfaceByIndex(index)
	if err != nil {
		return // it went; who comes next is another
	}
	wait := rand.N(askingDelay) // those that heard the router at once are not to ask at once
	for {
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		}
		a, refresh, err := information(ctx, *ifi)
		wait = againAfter
		now := time.Now()
		n.mu.Lock()
		changed := false
		if err == nil {
			wait = refresh
			next := announced{}
			next.take(a, now)
			changed = !maps.EqualFunc(next.servers, k.told.servers, anyTime) || !maps.EqualFunc(next.domains, k.told.domains, anyTime)
			k.told = next
		} else {
			changed = k.told.expire(now)
		}
		n.mu.Unlock()
		if !changed || ctx.Err() != nil {
			continue
		}
		if err := n.writeResolv(); err != nil {
			n.log("%v", err)
		}
		n.log("%s has name servers by DHCPv6", name)
		n.changed()
	}
}

func anyTime(_, _ time.Time) bool { return true }

// flags of the kernel's view of a link (linux/if_link.h, linux/ipv6.h in the kernel): what its routers said last.
const (
	attributeProtocol, attributeFlags = unix.IFLA_PROTINFO, 1 // IFLA_INET6_FLAGS
	flagManaged, flagOther            = 0x40, 0x80            // IF_RA_MANAGED, IF_RA_OTHERCONF
)

// more returns the links of which routers say that a DHCPv6 server knows more.
func more() (map[int]bool, error) {
	req := nl.NewNetlinkRequest(unix.RTM_GETLINK, unix.NLM_F_DUMP)
	req.AddData(nl.NewIfInfomsg(unix.AF_INET6))
	links, err := req.Execute(unix.NETLINK_ROUTE, unix.RTM_NEWLINK)
	if err != nil {
		return nil, fmt.Errorf("cannot ask what routers say: %w", err)
	}
	out := map[int]bool{}
	for _, b := range links {
		if len(b) < unix.SizeofIfInfomsg {
			continue
		}
		attributes, err := nl.ParseRouteAttrAsMap(b[unix.SizeofIfInfomsg:])
		if err != nil {
			continue
		}
		nested, err := nl.ParseRouteAttrAsMap(attributes[attributeProtocol].Value)
		if err != nil {
			continue
		}
		if v := nested[attributeFlags].Value; len(v) == 4 && binary.NativeEndian.Uint32(v)&(flagManaged|flagOther) != 0 {
			out[int(int32(binary.NativeEndian.Uint32(b[4:])))] = true
		}
	}
	return out, nil
}

// askFor has those links inform themselves of which routers say that there is more.
func (n *Net) askFor() error {
	those, err := more()
	if err != nil {
		return err
	}
	n.mu.Lock()
	defer n.mu.Unlock()
	for _, l := range n.links {
		if those[l.index] {
			select {
			case l.more <- struct{}{}:
			default: // it knows
			}
		}
	}
	return nil
}

// information asks once, more and more patiently.
func information(ctx context.Context, ifi net.Interface) (announcement, time.Duration, error) {
	ask, err := dhcpv6.NewMessage(dhcpv6.WithClientID(&dhcpv6.DUIDLL{HWType: 1, LinkLayerAddr: ifi.HardwareAddr}),
		dhcpv6.WithRequestedOptions(dhcpv6.OptionDNSRecursiveNameServer, dhcpv6.OptionDomainSearchList, dhcpv6.OptionInformationRefreshTime))
	if err != nil {
		return announcement{}, 0, err
	}
	ask.MessageType = dhcpv6.MessageTypeInformationRequest
	ask.AddOption(dhcpv6.OptElapsedTime(0))
	b := make([]byte, 1500)
	for timeout := firstTimeout; timeout <= mostTimeout && ctx.Err() == nil; timeout *= 2 {
		end := time.Now().Add(timeout)
		var c *net.UDPConn
		if c, err = linkLocal(ifi.Name); err != nil { // as long as the address is not known to be ours alone
			select {
			case <-ctx.Done():
			case <-time.After(timeout):
			}
			continue
		}
		stop := context.AfterFunc(ctx, func() { c.Close() })
		c.SetReadDeadline(end)
		_, err = c.WriteToUDP(ask.ToBytes(), &net.UDPAddr{IP: dhcpv6.AllDHCPRelayAgentsAndServers, Port: dhcpv6.DefaultServerPort, Zone: ifi.Name})
		for n := 0; err == nil; {
			if n, err = c.Read(b); err == nil {
				if a, refresh, ok := parseInformation(b[:n], ask); ok {
					a.link = ifi.Index
					stop()
					c.Close()
					return a, refresh, nil
				}
			}
		}
		stop()
		c.Close()
		if rest := time.Until(end); rest > 0 {
			select {
			case <-ctx.Done():
			case <-time.After(rest):
			}
		}
	}
	return announcement{}, 0, errors.Join(err, ctx.Err())
}

// linkLocal listens on the link's own address: nobody beyond the link reaches that.
func linkLocal(name string) (*net.UDPConn, error) {
	ip, err := dhcpv6.GetLinkLocalAddr(name)
	if err != nil {
		return nil, err
	}
	return net.ListenUDP("udp6", &net.UDPAddr{IP: ip, Port: dhcpv6.DefaultClientPort, Zone: name})
}

// parseInformation reads an answer to a request.
func parseInformation(b []byte, ask *dhcpv6.Message) (a announcement, refresh time.Duration, ok bool) {
	m, err := dhcpv6.MessageFromBytes(b)
	if err != nil || m.MessageType != dhcpv6.MessageTypeReply || m.TransactionID != ask.TransactionID || m.Options.ServerID() == nil {
		return a, 0, false
	}
	if id := m.Options.ClientID(); id != nil && !id.Equal(ask.Options.ClientID()) {
		return a, 0, false
	}
	if s := m.Options.Status(); s != nil && s.StatusCode != 0 {
		return a, 0, false
	}
	for _, ip := range m.Options.DNS() {
		if s, ok := netip.AddrFromSlice(ip); ok {
			raw := s.As16()
			for _, s := range addresses(raw[:]) {
				if len(a.servers) < maxAnnounced && !slices.Contains(a.servers, s) {
					a.servers = append(a.servers, s)
				}
			}
		}
	}
	if l := m.Options.DomainSearchList(); l != nil {
		for _, d := range names(l.Labels) {
			if len(a.domains) < maxAnnounced {
				a.domains = append(a.domains, d)
			}
		}
	}
	refresh = min(max(m.Options.InformationRefreshTime(maxLifetime), leastRefresh), maxLifetime)
	a.lifetime = refresh + againAfter + time.Minute // until the next answer is there
	return a, refresh, true
}
