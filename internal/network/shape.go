package network

import (
	"errors"
	"fmt"
	"math"
	"os"
	"strconv"
	"strings"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"

	"github.com/cloudos-io/cloudos/internal/fault"
)

// Limits of bandwidth, of each container's link: both directions, or what it
// receives (ingress) and sends (egress). A network's are its containers' unless
// their endpoints say otherwise.
const (
	optBandwidth   = "com.servin.network.bandwidth"
	optBandwidthIn = "com.servin.network.bandwidth.ingress"
	optBandwidthEg = "com.servin.network.bandwidth.egress"
)

// shaping is in bytes a second; 0 is no limit.
type shaping struct{ in, out uint64 }

// parseBandwidth overrides what is given by options.
func parseBandwidth(b shaping, o map[string]string) (shaping, error) {
	for _, k := range []string{optBandwidth, optBandwidthIn, optBandwidthEg} {
		v, ok := o[k]
		if !ok {
			continue
		}
		r, err := parseRate(v)
		if err != nil {
			return b, fault.New(fault.Invalid, "cannot use option %s=%q: %w", k, v, err)
		}
		if k != optBandwidthEg {
			b.in = r
		}
		if k != optBandwidthIn {
			b.out = r
		}
	}
	return b, nil
}

// parseRate reads a rate as tc(8) writes them: 100mbit, 1.5gbit, 64kbit in bits,
// 10mbps in bytes a second; 0 or "unlimited" is no limit.
func parseRate(s string) (uint64, error) {
	s = strings.ToLower(strings.TrimSpace(s))
	if s == "unlimited" || s == "0" {
		return 0, nil
	}
	num := strings.TrimRight(s, "abcdefghijklmnopqrstuvwxyz")
	unit := s[len(num):]
	per := 1.0 / 8
	if u, ok := strings.CutSuffix(unit, "bps"); ok {
		unit, per = u, 1
	} else {
		unit = strings.TrimSuffix(unit, "bit")
	}
	scale, ok := map[string]float64{"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}[unit]
	f, err := strconv.ParseFloat(num, 64)
	if err != nil || !ok {
		return 0, errors.New("write a rate such as 100mbit or 10mbps")
	}
	if r := f * scale * per; r >= 1000 && r < 1e12 {
		return uint64(r), nil
	}
	return 0, errors.New("a rate from 8kbit to 8tbit is wanted")
}

// ifbOf is the device through which passes what a shaped link takes in.
func (m *Manager) ifbOf(outer string) string {
	return m.vethPrefix() + "f" + strings.TrimPrefix(outer, m.vethPrefix()+"v")
}

// ifbInside is the same for a link that has no end in our namespace.
func ifbInside(name string) string { return "ifb-" + name[:min(len(name), 11)] }

// shape limits an endpoint's link.
func (m *Manager) shape(n *netw, e *endpoint, ns *os.File) error {
	b, err := parseBandwidth(n.opts.bandwidth, e.DriverOpts)
	if err != nil {
		return err
	}
	if b == (shaping{}) {
		return nil
	}
	if e.Outer != "" {
		// Seen from here the container receives what the link sends.
		h, err := netlink.NewHandle(unix.NETLINK_ROUTE)
		if err != nil {
			return err
		}
		defer h.Close()
		e.Shaped = true
		err = limit(h, e.Outer, m.ifbOf(e.Outer), b.in, b.out)
		return shapeFault(err)
	}
	h, err := netlink.NewHandleAt(netns.NsHandle(ns.Fd()), unix.NETLINK_ROUTE)
	if err != nil {
		return err
	}
	defer h.Close()
	return shapeFault(limit(h, e.IfName, ifbInside(e.IfName), b.out, b.in))
}

func shapeFault(err error) error {
	if err == nil {
		return nil
	}
	if errors.Is(err, unix.EOPNOTSUPP) || errors.Is(err, unix.ENOENT) {
		return fault.New(fault.Unsupported, "cannot limit the bandwidth: the kernel lacks sch_tbf, sch_ingress, cls_u32, act_mirred or ifb: %w", err)
	}
	return fmt.Errorf("cannot limit the bandwidth: %w", err)
}

// limit bounds what a link sends, and by way of a device of its own, what it
// takes in. Doing it again does no harm.
func limit(h *netlink.Handle, name, ifb string, sends, takes uint64) error {
	l, err := h.LinkByName(name)
	if err != nil {
		return err
	}
	mtu := l.Attrs().MTU
	if sends > 0 {
		if err := h.QdiscReplace(tokens(l.Attrs().Index, sends, mtu)); err != nil {
			return err
		}
	}
	if takes == 0 {
		return nil
	}
	f, err := h.LinkByName(ifb)
	if err != nil {
		if err := h.LinkAdd(&netlink.Ifb{LinkAttrs: netlink.LinkAttrs{Name: ifb, MTU: mtu, TxQLen: 1000}}); err != nil && !errors.Is(err, unix.EEXIST) {
			return err
		}
		if f, err = h.LinkByName(ifb); err != nil {
			return err
		}
	}
	if err := h.LinkSetUp(f); err != nil {
		return err
	}
	if err := h.QdiscReplace(tokens(f.Attrs().Index, takes, mtu)); err != nil {
		return err
	}
	in := &netlink.Ingress{QdiscAttrs: netlink.QdiscAttrs{LinkIndex: l.Attrs().Index, Handle: netlink.MakeHandle(0xffff, 0), Parent: netlink.HANDLE_INGRESS}}
	if err := h.QdiscAdd(in); errors.Is(err, unix.EEXIST) {
		return nil // all of it is there
	} else if err != nil {
		return err
	}
	return h.FilterAdd(&netlink.U32{
		FilterAttrs: netlink.FilterAttrs{LinkIndex: l.Attrs().Index, Parent: in.Handle, Priority: 1, Protocol: unix.ETH_P_ALL},
		ClassId:     netlink.MakeHandle(1, 1), RedirIndex: f.Attrs().Index,
		Actions: []netlink.Action{&netlink.MirredAction{ActionAttrs: netlink.ActionAttrs{}, MirredAction: netlink.TCA_EGRESS_REDIR, Ifindex: f.Attrs().Index}},
	})
}

// tokens is a token bucket: bursts of 5 ms, and of 64 KiB at least, since one
// packet of segmentation offload is that large; 50 ms of queue.
func tokens(index int, rate uint64, mtu int) *netlink.Tbf {
	burst := uint32(min(max(rate/200, uint64(max(mtu, 1500))*2, 64<<10), math.MaxInt32))
	return &netlink.Tbf{
		QdiscAttrs: netlink.QdiscAttrs{LinkIndex: index, Handle: netlink.MakeHandle(1, 0), Parent: netlink.HANDLE_ROOT},
		Rate:       rate, Limit: uint32(min(rate/20+uint64(burst), math.MaxUint32)), Buffer: netlink.Xmittime(rate, burst),
	}
}

// unshape removes the device beside a link that is gone.
func (m *Manager) unshape(outer string) error {
	if i := m.links.Index(m.ifbOf(outer)); i != 0 {
		return m.links.Delete(i)
	}
	return nil
}
