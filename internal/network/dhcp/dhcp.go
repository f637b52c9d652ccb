// Package dhcp gets addresses for containers' links from the DHCP server of the
// network that their parent is on. Acquire asks for a lease from within a
// container's network namespace; a *keeper*, one process of an engine
// (servin-dhcp: servind executed again), renews leases for as long as containers
// live, whether an engine runs or not. The keeper holds no container's namespace:
// it looks for it each time, and forgets a lease whose namespace is gone. Package
// network imports it, and cmd/servind for the keeper's main function.
package dhcp

import (
	"context"
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"strings"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/dhcpv4/nclient4"
	"github.com/mdlayher/packet"
	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/fault"
	"github.com/cloudos-io/cloudos/internal/network/bridge"
)

// Identity is how a container's link is known to servers.
type Identity struct {
	IfName   string
	MAC      net.HardwareAddr
	Hostname string
	// ClientID is option 61: the same over restarts of the container.
	ClientID []byte
	// Want is the address to ask for, if any.
	Want netip.Addr
}

// Lease is an address for a time.
type Lease struct {
	Addr    netip.Prefix
	Gateway netip.Addr   `json:",omitzero"`
	DNS     []netip.Addr `json:",omitempty"`
	Server  netip.Addr   `json:",omitzero"`
	// Got is when it was given, by the host's clock; Renew, Rebind and End are
	// when it is to be renewed, by anybody renewed, and over.
	Got, Renew, Rebind, End time.Time
	// Offer and ACK are the server's messages, in base64.
	Offer, ACK string
}

// Patience is how long a server is waited for.
const Patience = 15 * time.Second

func client(ns *os.File, id Identity) (*nclient4.Client, error) {
	var c *nclient4.Client
	err := bridge.Inside(ns, func() error {
		conn, err := nclient4.NewRawUDPConn(id.IfName, nclient4.ClientPort)
		if err != nil {
			return err
		}
		if c, err = nclient4.NewWithConn(conn, id.MAC, nclient4.WithTimeout(2*time.Second), nclient4.WithRetry(6)); err != nil {
			conn.Close()
		}
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("cannot speak DHCP on %s: %w", id.IfName, err)
	}
	return c, nil
}

func (id Identity) options() []dhcpv4.Modifier {
	mods := []dhcpv4.Modifier{
		dhcpv4.WithRequestedOptions(dhcpv4.OptionSubnetMask, dhcpv4.OptionRouter, dhcpv4.OptionDomainNameServer, dhcpv4.OptionRenewTimeValue, dhcpv4.OptionRebindingTimeValue),
		// Replies come by broadcast: the link has no address yet, or shares its
		// parent's MAC.
		dhcpv4.WithBroadcast(true),
	}
	if len(id.ClientID) > 0 {
		mods = append(mods, dhcpv4.WithOption(dhcpv4.OptClientIdentifier(append([]byte{0}, id.ClientID...))))
	}
	if validHost(id.Hostname) {
		mods = append(mods, dhcpv4.WithOption(dhcpv4.OptHostName(id.Hostname)))
	}
	return mods
}

func validHost(s string) bool {
	if s == "" || len(s) > 63 {
		return false
	}
	for _, c := range []byte(s) {
		if (c < '0' || c > '9') && (c < 'a' || c > 'z') && (c < 'A' || c > 'Z') && c != '-' {
			return false
		}
	}
	return true
}

// Acquire gets a lease for a link that is up in ns. The address is not set.
func Acquire(ctx context.Context, ns *os.File, id Identity) (Lease, error) {
	ctx, cancel := context.WithTimeout(ctx, Patience)
	defer cancel()
	c, err := client(ns, id)
	if err != nil {
		return Lease{}, err
	}
	defer c.Close()
	mods := id.options()
	if id.Want.Is4() {
		mods = append(mods, dhcpv4.WithOption(dhcpv4.OptRequestedIPAddress(id.Want.AsSlice())))
	}
	got, err := c.Request(ctx, mods...)
	if err != nil {
		if ctx.Err() != nil || errors.Is(err, nclient4.ErrNoResponse) {
			return Lease{}, fault.New(fault.DeadlineExceeded, "cannot get an address by DHCP: no server answered on %s", id.IfName)
		}
		return Lease{}, fmt.Errorf("cannot get an address by DHCP: %w", err)
	}
	l, err := parse(got.Offer, got.ACK, time.Now())
	if err != nil {
		return Lease{}, err
	}
	if id.Want.IsValid() && l.Addr.Addr() != id.Want {
		_ = Release(ns, id, l)
		return Lease{}, fault.New(fault.Conflict, "cannot use address %s: the DHCP server gives out %s", id.Want, l.Addr.Addr())
	}
	return l, nil
}

// errRefused: the server says that the lease is not ours any more.
var errRefused = errors.New("the DHCP server refused to renew the lease")

// renew asks for more time.
func renew(ctx context.Context, ns *os.File, id Identity, l Lease) (Lease, error) {
	old, err := l.messages()
	if err != nil {
		return Lease{}, err
	}
	c, err := client(ns, id)
	if err != nil {
		return Lease{}, err
	}
	defer c.Close()
	got, err := c.Renew(ctx, old, id.options()...)
	if nak := new(nclient4.ErrNak); errors.As(err, &nak) {
		return Lease{}, errRefused
	}
	if err != nil {
		return Lease{}, err
	}
	return parse(got.Offer, got.ACK, time.Now())
}

// Release gives a lease back; nobody answers. The frame is made by hand: asking
// for the server's hardware address could outlast the link.
func Release(ns *os.File, id Identity, l Lease) error {
	old, err := l.messages()
	if err != nil {
		return err
	}
	var mods []dhcpv4.Modifier
	if len(id.ClientID) > 0 {
		mods = append(mods, dhcpv4.WithOption(dhcpv4.OptClientIdentifier(append([]byte{0}, id.ClientID...))))
	}
	msg, err := dhcpv4.NewReleaseFromACK(old.ACK, mods...)
	if err != nil {
		return fmt.Errorf("cannot give a lease back: %w", err)
	}
	err = bridge.Inside(ns, func() error {
		ifc, err := net.InterfaceByName(id.IfName)
		if err != nil {
			return err
		}
		raw, err := packet.Listen(ifc, packet.Datagram, unix.ETH_P_IP, nil)
		if err != nil {
			return err
		}
		defer raw.Close()
		c := nclient4.NewBroadcastUDPConn(raw, &net.UDPAddr{IP: l.Addr.Addr().AsSlice(), Port: nclient4.ClientPort})
		_, err = c.WriteTo(msg.ToBytes(), &net.UDPAddr{IP: l.Server.AsSlice(), Port: nclient4.ServerPort})
		return err
	})
	if err != nil {
		return fmt.Errorf("cannot give a lease back: %w", err)
	}
	return nil
}

func (l Lease) messages() (*nclient4.Lease, error) {
	out := &nclient4.Lease{CreationTime: l.Got}
	for _, x := range []struct {
		text string
		to   **dhcpv4.DHCPv4
	}{{l.Offer, &out.Offer}, {l.ACK, &out.ACK}} {
		b, err := base64.StdEncoding.DecodeString(x.text)
		if err != nil {
			return nil, fmt.Errorf("cannot use a stored lease: %w", err)
		}
		if *x.to, err = dhcpv4.FromBytes(b); err != nil {
			return nil, fmt.Errorf("cannot use a stored lease: %w", err)
		}
	}
	return out, nil
}

// Bounds of what a server may say about time.
const (
	shortest = 10 * time.Second
	longest  = 10 * 365 * 24 * time.Hour
)

// parse takes what it needs from a server's answer, which is not to be trusted.
func parse(offer, ack *dhcpv4.DHCPv4, now time.Time) (Lease, error) {
	l := Lease{Got: now, Offer: base64.StdEncoding.EncodeToString(offer.ToBytes()), ACK: base64.StdEncoding.EncodeToString(ack.ToBytes())}
	addr, ok := netip.AddrFromSlice(ack.YourIPAddr.To4())
	if !ok || addr.IsUnspecified() || addr.IsLoopback() || addr.IsMulticast() || addr == netip.AddrFrom4([4]byte{255, 255, 255, 255}) {
		return l, fault.New(fault.Unavailable, "cannot use the DHCP server's answer: %s is no address for a container", ack.YourIPAddr)
	}
	ones, bits := ack.SubnetMask().Size()
	if bits != 32 || ones == 0 {
		return l, fault.New(fault.Unavailable, "cannot use the DHCP server's answer: it names no subnet mask")
	}
	l.Addr = netip.PrefixFrom(addr, ones)
	if rs := ack.Router(); len(rs) > 0 {
		if g, ok := netip.AddrFromSlice(rs[0].To4()); ok && l.Addr.Contains(g) && g != addr {
			l.Gateway = g
		}
	}
	for _, d := range ack.DNS() {
		if a, ok := netip.AddrFromSlice(d.To4()); ok && len(l.DNS) < 3 {
			l.DNS = append(l.DNS, a)
		}
	}
	if s, ok := netip.AddrFromSlice(ack.ServerIdentifier().To4()); ok {
		l.Server = s
	}
	total := min(max(ack.IPAddressLeaseTime(time.Hour), shortest), longest)
	t1, t2 := ack.IPAddressRenewalTime(total/2), ack.IPAddressRebindingTime(total*7/8)
	if t1 <= 0 || t1 >= total {
		t1 = total / 2
	}
	if t2 <= t1 || t2 >= total {
		t2 = (t1 + total) / 2
	}
	l.Renew, l.Rebind, l.End = now.Add(max(t1, shortest/2)), now.Add(t2), now.Add(total)
	return l, nil
}

// String tells of a lease in a log.
func (l Lease) String() string {
	return strings.TrimSpace(fmt.Sprintf("%s from %s until %s", l.Addr, l.Server, l.End.UTC().Format(time.RFC3339)))
}
