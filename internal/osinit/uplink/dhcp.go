package uplink

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/dhcpv4/nclient4"
)

// lease is what a DHCP server gave.
type lease struct {
	Addr    netip.Prefix
	Gateway netip.Addr
	DNS     []netip.Addr
	Search  []string
	NTP     []netip.Addr
	MTU     int
	Routes  []Route
	Renew   time.Duration
	Rebind  time.Duration
	End     time.Duration
	raw     *nclient4.Lease
}

var wanted = []dhcpv4.OptionCode{
	dhcpv4.OptionSubnetMask, dhcpv4.OptionRouter, dhcpv4.OptionDomainNameServer, dhcpv4.OptionDNSDomainSearchList, dhcpv4.OptionDomainName,
	dhcpv4.OptionNTPServers, dhcpv4.OptionInterfaceMTU, dhcpv4.OptionClasslessStaticRoute, dhcpv4.OptionRenewTimeValue, dhcpv4.OptionRebindingTimeValue,
}

// acquire asks for a lease, or for the old one again.
func acquire(ctx context.Context, name, hostname string, old *nclient4.Lease) (*lease, error) {
	ifi, err := net.InterfaceByName(name)
	if err != nil {
		return nil, err
	}
	c, err := nclient4.New(name, nclient4.WithHWAddr(ifi.HardwareAddr), nclient4.WithTimeout(time.Second), nclient4.WithRetry(4))
	if err != nil {
		return nil, err
	}
	defer c.Close()
	mods := []dhcpv4.Modifier{dhcpv4.WithRequestedOptions(wanted...), dhcpv4.WithOption(dhcpv4.OptMaxMessageSize(1472))}
	if hostname != "" {
		mods = append(mods, dhcpv4.WithOption(dhcpv4.OptHostName(hostname)))
	}
	var l *nclient4.Lease
	if old != nil {
		l, err = c.Renew(ctx, old, mods...)
	} else {
		l, err = c.Request(ctx, mods...)
	}
	if err != nil {
		return nil, err
	}
	return parseLease(l)
}

func parseLease(raw *nclient4.Lease) (*lease, error) {
	ack := raw.ACK
	l := &lease{raw: raw}
	a, ok := netip.AddrFromSlice(ack.YourIPAddr.To4())
	if !ok || a.IsUnspecified() {
		return nil, errors.New("the server gave no address")
	}
	bits := 24
	if mask := ack.SubnetMask(); mask != nil {
		if bits, _ = mask.Size(); bits == 0 {
			return nil, fmt.Errorf("the server gave the mask %s", mask)
		}
	}
	l.Addr = netip.PrefixFrom(a, bits)
	addrs := func(ips []net.IP) (out []netip.Addr) {
		for _, ip := range ips {
			if a, ok := netip.AddrFromSlice(ip.To4()); ok && !a.IsUnspecified() {
				out = append(out, a)
			}
		}
		return out
	}
	if r := addrs(ack.Router()); len(r) > 0 {
		l.Gateway = r[0]
	}
	l.DNS, l.NTP = addrs(ack.DNS()), addrs(ack.NTPServers())
	if s := ack.DomainSearch(); s != nil {
		l.Search = s.Labels
	} else if d := ack.DomainName(); d != "" {
		l.Search = []string{d}
	}
	if b := ack.Options.Get(dhcpv4.OptionInterfaceMTU); len(b) == 2 {
		if mtu := int(b[0])<<8 | int(b[1]); mtu >= 576 {
			l.MTU = mtu
		}
	}
	for _, r := range ack.ClasslessStaticRoute() {
		to, ok := netip.AddrFromSlice(r.Dest.IP.To4())
		via, ok2 := netip.AddrFromSlice(r.Router.To4())
		if !ok || !ok2 {
			continue
		}
		ones, _ := r.Dest.Mask.Size()
		// RFC 3442: a default route here stands in for the router option.
		if ones == 0 {
			l.Gateway = via
			continue
		}
		route := Route{To: netip.PrefixFrom(to, ones)}
		if !via.IsUnspecified() {
			route.Via = via
		}
		l.Routes = append(l.Routes, route)
	}
	l.End = ack.IPAddressLeaseTime(time.Hour)
	l.Renew = ack.IPAddressRenewalTime(l.End / 2)
	l.Rebind = ack.IPAddressRebindingTime(l.End * 7 / 8)
	l.Renew = max(l.Renew, 10*time.Second)
	l.Rebind, l.End = max(l.Rebind, l.Renew), max(l.End, l.Rebind)
	return l, nil
}
