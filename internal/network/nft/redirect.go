package nft

import (
	"errors"
	"fmt"
	"net/netip"
	"os"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// RedirectNames sends what a container asks of addr, port 53, to the ports
// that its name server really listens on, so that the container itself may
// bind port 53 on all addresses.
func RedirectNames(ns *os.File, addr netip.Addr, udp, tcp uint16) error {
	err := redirect(ns, addr, udp, tcp, false)
	if errors.Is(err, unix.EEXIST) {
		err = redirect(ns, addr, udp, tcp, true)
	}
	if err != nil {
		return fmt.Errorf("cannot redirect the container's name questions: %w", err)
	}
	return nil
}

// redirect writes the rules. Replacing is apart because a transaction that
// deletes makes the kernel wait for all CPUs when the socket is closed, which
// a container's start must not.
func redirect(ns *os.File, addr netip.Addr, udp, tcp uint16, replace bool) error {
	c, err := nftables.New(nftables.WithNetNSFd(int(ns.Fd())))
	if err != nil {
		return err
	}
	tab := &nftables.Table{Name: "servin_names", Family: nftables.TableFamilyIPv4}
	if replace {
		c.AddTable(tab)
		c.DelTable(tab)
	}
	c.CreateTable(tab)
	w := &writer{c: c, tab: tab, f: ip4}
	out := w.chain("leave", nftables.ChainTypeNAT, nftables.ChainHookOutput, -100)
	for _, x := range []struct {
		proto Proto
		port  uint16
	}{{UDP, udp}, {TCP, tcp}} {
		w.rule(out, w.header(ip4.daddr, 4, reg0), cmp(addr.AsSlice()),
			[]expr.Any{&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg0}}, cmp([]byte{byte(x.proto)}),
			[]expr.Any{&expr.Payload{DestRegister: reg0, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2}}, cmp([]byte{0, 53}),
			[]expr.Any{
				&expr.Immediate{Register: unix.NFT_REG_1, Data: addr.AsSlice()},
				&expr.Immediate{Register: unix.NFT_REG_2, Data: []byte{byte(x.port >> 8), byte(x.port)}},
				&expr.NAT{Type: expr.NATTypeDestNAT, Family: uint32(ip4.nf), RegAddrMin: unix.NFT_REG_1, RegProtoMin: unix.NFT_REG_2, Specified: true},
			})
	}
	return c.Flush()
}
