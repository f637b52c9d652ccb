package nft

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// Service is a service address and the addresses behind it, all of one family.
type Service struct {
	VIP      netip.Addr
	Backends []netip.Addr
	// Sticky sends a client's connections to one backend, as long as there are
	// the same ones.
	Sticky bool
}

// servicesTable is the table in a client's network namespace.
const servicesTable = "servin_services"

// maxBackends bounds a service's spread.
const maxBackends = 1024

// Services translates service addresses in one client's network namespace: where
// a connection begins, so that its source address is the client's and replies
// come from whom the client believes to speak to, on one bridge, too.
type Services struct {
	conn *nftables.Conn
	six  bool
	live bool
}

// OpenServices connects to a namespace. It stays open: closing makes the kernel
// wait for what was deleted before.
func OpenServices(ns *os.File, six bool) (*Services, error) {
	c, err := nftables.New(nftables.WithNetNSFd(int(ns.Fd())), nftables.AsLasting())
	if err != nil {
		return nil, fmt.Errorf("cannot open nftables in a container: %w", err)
	}
	return &Services{conn: c, six: six}, nil
}

// Close gives the socket back. The rules stay.
func (s *Services) Close() { _ = s.conn.CloseLasting() }

// Set puts services in place of those before, in one transaction a family.
func (s *Services) Set(list []Service) error {
	fams := []family{ip4}
	if s.six {
		fams = append(fams, ip6)
	}
	for _, f := range fams {
		if err := s.set(f, list); err != nil {
			return fmt.Errorf("cannot set up service addresses in a container: %w", err)
		}
	}
	s.live = true
	return nil
}

func (s *Services) set(f family, list []Service) error {
	c := s.conn
	tab := c.AddTable(&nftables.Table{Name: servicesTable, Family: f.table})
	var id uint32
	w := &writer{c: c, tab: tab, f: f, id: &id, sets: map[string]*nftables.Set{}}
	pick := w.chain("spread", nftables.ChainTypeNAT, nftables.ChainHookOutput, -99)
	refuse := w.chain("refuse", nftables.ChainTypeFilter, nftables.ChainHookOutput, 0)
	c.FlushChain(pick)
	c.FlushChain(refuse)
	for _, x := range list {
		if !f.is(x.VIP) {
			continue
		}
		var to []netip.Addr
		for _, b := range x.Backends[:min(len(x.Backends), maxBackends)] {
			if f.is(b) {
				to = append(to, b.Unmap())
			}
		}
		vip := append(w.header(f.daddr, uint32(f.size), unix.NFT_REG_1), &expr.Cmp{Op: expr.CmpOpEq, Register: unix.NFT_REG_1, Data: x.VIP.Unmap().AsSlice()})
		dnat := []expr.Any{&expr.NAT{Type: expr.NATTypeDestNAT, Family: uint32(f.nf), RegAddrMin: unix.NFT_REG_1}}
		switch len(to) {
		case 0: // refused below, so that the client need not wait
		case 1:
			w.rule(pick, vip, []expr.Any{&expr.Immediate{Register: unix.NFT_REG_1, Data: to[0].AsSlice()}}, dnat)
		default:
			// With an id of this transaction: those that the library gives out are of a
			// counter that connections share without a lock. The kernel completes the name.
			id++
			m := &nftables.Set{Table: tab, Name: "__map%d", ID: id, Anonymous: true, Constant: true, IsMap: true, KeyType: nftables.TypeInteger, DataType: f.addrType}
			elems := make([]nftables.SetElement, len(to))
			for i, a := range to {
				elems[i] = nftables.SetElement{Key: binary.NativeEndian.AppendUint32(nil, uint32(i)), Val: a.AsSlice()}
			}
			if err := c.AddSet(m, elems); err != nil {
				return err
			}
			var choose []expr.Any
			if x.Sticky {
				choose = append(w.header(f.saddr, uint32(f.size), unix.NFT_REG_2),
					&expr.Hash{SourceRegister: unix.NFT_REG_2, DestRegister: unix.NFT_REG_1, Length: uint32(f.size), Modulus: uint32(len(to)), Seed: 0x5e471, Type: expr.HashTypeJenkins})
			} else {
				choose = []expr.Any{&expr.Numgen{Register: unix.NFT_REG_1, Modulus: uint32(len(to)), Type: unix.NFT_NG_RANDOM}}
			}
			w.rule(pick, vip, choose, []expr.Any{&expr.Lookup{SourceRegister: unix.NFT_REG_1, DestRegister: unix.NFT_REG_1, IsDestRegSet: true, SetName: m.Name, SetID: m.ID}}, dnat)
		}
		tcp := []expr.Any{&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: unix.NFT_REG_1}, &expr.Cmp{Op: expr.CmpOpEq, Register: unix.NFT_REG_1, Data: []byte{unix.IPPROTO_TCP}}}
		w.rule(refuse, vip, tcp, []expr.Any{&expr.Reject{Type: unix.NFT_REJECT_TCP_RST}})
		code := uint8(3) // port unreachable
		if f.size == 16 {
			code = 4
		}
		w.rule(refuse, vip, []expr.Any{&expr.Reject{Type: unix.NFT_REJECT_ICMP_UNREACH, Code: code}})
	}
	return c.Flush()
}

// Clear removes the table; there may be none.
func (s *Services) Clear() error {
	var errs error
	for _, f := range []family{ip4, ip6} {
		if f.size == 16 && !s.six {
			continue
		}
		tab := &nftables.Table{Name: servicesTable, Family: f.table}
		s.conn.AddTable(tab)
		s.conn.DelTable(tab)
		errs = errors.Join(errs, s.conn.Flush())
	}
	return errs
}
