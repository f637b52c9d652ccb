// Package ipam hands out subnets and the addresses in them. It keeps state in
// memory only: package network rebuilds it from its records when it starts. A
// pool is one subnet; its range is the part that addresses are chosen from.
// Package network imports it.
package ipam

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/big"
	"net/netip"
	"sync"
)

// ErrExhausted says that a pool has no free address left.
var ErrExhausted = errors.New("no available IPv4 or IPv6 addresses on this network")

// ErrInUse says that an address asked for is taken.
var ErrInUse = errors.New("address already in use")

// ErrOutside says that an address asked for is not of the pool's subnet.
var ErrOutside = errors.New("address is outside the network's subnets")

// Pool is one subnet of a network. It is safe for concurrent use.
type Pool struct {
	subnet netip.Prefix
	rng    netip.Prefix
	first  netip.Addr
	last   netip.Addr

	mu   sync.Mutex
	used map[netip.Addr]struct{}
	next netip.Addr
}

// NewPool makes a pool of the subnet. rng narrows what Next chooses from; the
// zero prefix means the whole subnet.
func NewPool(subnet, rng netip.Prefix) (*Pool, error) {
	if !subnet.IsValid() || subnet != subnet.Masked() {
		return nil, fmt.Errorf("subnet %s has bits set after its prefix length", subnet)
	}
	if !rng.IsValid() {
		rng = subnet
	}
	if rng != rng.Masked() || rng.Bits() < subnet.Bits() || !subnet.Contains(rng.Addr()) {
		return nil, fmt.Errorf("range %s is not part of subnet %s", rng, subnet)
	}
	p := &Pool{subnet: subnet, rng: rng, used: map[netip.Addr]struct{}{}}
	p.first, p.last = rng.Addr(), Last(rng)
	// The network's own address and, in IPv4, the broadcast address are not
	// for hosts, except where a prefix is too small to have them (RFC 3021).
	if subnet.Addr().BitLen()-subnet.Bits() >= 2 {
		if p.first == subnet.Addr() {
			p.first = p.first.Next()
		}
		if p.last == Last(subnet) && subnet.Addr().Is4() {
			p.last = p.last.Prev()
		}
	}
	if p.last.Less(p.first) {
		return nil, fmt.Errorf("range %s has no address for a host", rng)
	}
	p.next = p.first
	return p, nil
}

// Subnet is the pool's subnet.
func (p *Pool) Subnet() netip.Prefix { return p.subnet }

// Range is the part of the subnet that Next chooses from.
func (p *Pool) Range() netip.Prefix { return p.rng }

// Next takes a free address. It goes round the range, so that an address is
// reused as late as possible.
func (p *Pool) Next() (netip.Addr, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	start := p.next
	for a := start; ; {
		after := a.Next()
		if a == p.last {
			after = p.first
		}
		if _, taken := p.used[a]; !taken {
			p.used[a] = struct{}{}
			p.next = after
			return a, nil
		}
		if a = after; a == start {
			return netip.Addr{}, ErrExhausted
		}
	}
}

// First takes the lowest free address: what a gateway gets.
func (p *Pool) First() (netip.Addr, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	for a := p.first; ; a = a.Next() {
		if _, taken := p.used[a]; !taken {
			p.used[a] = struct{}{}
			if a == p.next && a != p.last {
				p.next = a.Next()
			}
			return a, nil
		}
		if a == p.last {
			return netip.Addr{}, ErrExhausted
		}
	}
}

// Take takes the address asked for.
func (p *Pool) Take(a netip.Addr) error {
	a = a.Unmap()
	if !p.subnet.Contains(a) {
		return ErrOutside
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if _, taken := p.used[a]; taken {
		return ErrInUse
	}
	p.used[a] = struct{}{}
	return nil
}

// Free gives an address back. Freeing a free one changes nothing.
func (p *Pool) Free(a netip.Addr) {
	p.mu.Lock()
	delete(p.used, a.Unmap())
	p.mu.Unlock()
}

// Usage tells how many addresses are in use or reserved, and how many Next
// could still give; both saturate at 2^64-1.
func (p *Pool) Usage() (inUse, available uint64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	var inside uint64
	for a := range p.used {
		if !a.Less(p.first) && !p.last.Less(a) {
			inside++
		}
	}
	inUse = uint64(len(p.used))
	if p.first != p.rng.Addr() || p.rng.Addr() == p.subnet.Addr() && p.first != p.subnet.Addr() {
		inUse++
	}
	if p.last != Last(p.rng) {
		inUse++
	}
	size := new(big.Int).Sub(toInt(p.last), toInt(p.first))
	size.Add(size, big.NewInt(1))
	size.Sub(size, new(big.Int).SetUint64(inside))
	if !size.IsUint64() {
		return inUse, ^uint64(0)
	}
	return inUse, size.Uint64()
}

func toInt(a netip.Addr) *big.Int { return new(big.Int).SetBytes(a.AsSlice()) }

// Last is the highest address of a prefix.
func Last(p netip.Prefix) netip.Addr {
	b := p.Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 1 << (7 - i%8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

// Block is a range of addresses that subnets of the given size are cut from.
type Block struct {
	Base netip.Prefix
	Size int // prefix length of each subnet
}

// DefaultBlocks are the ranges used for networks that name no subnet, in the
// order in which they are tried: first what users of Docker are used to.
func DefaultBlocks() []Block {
	var b []Block
	for i := 17; i <= 31; i++ {
		b = append(b, Block{netip.PrefixFrom(netip.AddrFrom4([4]byte{172, byte(i), 0, 0}), 16), 16})
	}
	return append(b,
		Block{netip.MustParsePrefix("192.168.0.0/16"), 20},
		Block{netip.MustParsePrefix("10.128.0.0/9"), 20})
}

// Choose finds a subnet of the blocks that overlaps none of the busy ones.
func Choose(blocks []Block, busy []netip.Prefix) (netip.Prefix, error) {
	for _, b := range blocks {
		if !b.Base.IsValid() || b.Size < b.Base.Bits() || b.Size > b.Base.Addr().BitLen() {
			return netip.Prefix{}, fmt.Errorf("address pool %s cannot be cut into subnets of /%d", b.Base, b.Size)
		}
		// More than this many tries would not end in sensible time; no host
		// has as many routes.
		const tries = 1 << 16
		s := netip.PrefixFrom(b.Base.Masked().Addr(), b.Size)
		for range tries {
			hit := false
			for _, o := range busy {
				if s.Overlaps(o) {
					hit = true
					break
				}
			}
			if !hit {
				return s, nil
			}
			n := Last(s).Next()
			if !n.IsValid() || !b.Base.Contains(n) {
				break
			}
			s = netip.PrefixFrom(n, b.Size)
		}
	}
	return netip.Prefix{}, fmt.Errorf("all predefined address pools have been fully subnetted")
}

// ULA is the IPv6 unique local subnet (RFC 4193) of a network: 40 bits of the
// seed make its global id and 16 its subnet id.
func ULA(seed [7]byte) netip.Prefix {
	b := [16]byte{0: 0xfd}
	copy(b[1:8], seed[:])
	return netip.PrefixFrom(netip.AddrFrom16(b), 64)
}

// Mirror is the address in the IPv6 prefix whose host part is that of an IPv4
// address, so that both families and the MAC belong together.
func Mirror(v6 netip.Prefix, subnet netip.Prefix, a netip.Addr) (netip.Addr, bool) {
	if !a.Is4() || !v6.Addr().Is6() || v6.Bits() > 96 {
		return netip.Addr{}, false
	}
	x, base := a.As4(), subnet.Masked().Addr().As4()
	host := binary.BigEndian.Uint32(x[:]) - binary.BigEndian.Uint32(base[:])
	b := v6.Addr().As16()
	binary.BigEndian.PutUint32(b[12:], host)
	return netip.AddrFrom16(b), true
}
