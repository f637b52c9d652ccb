package nft

import (
	"encoding/binary"
	"net/netip"

	"github.com/google/nftables"
	"github.com/google/nftables/binaryutil"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"
)

// The sets and maps of a table.
const (
	setBridges  = "bridges"   // our bridges
	setInternal = "internal"  // those that reach nothing outside
	setSame     = "same"      // pairs of one bridge with itself
	setOpen     = "open"      // bridges reachable without publishing
	setMasq     = "masq"      // subnets whose source is masqueraded
	setHairpin  = "hairpin"   // bridge and its subnet
	setRouted   = "routed"    // container address, protocol, port
	setIn       = "in"        // protocol, port: by way of input
	setInAddr   = "in_addr"   // address, protocol, port
	setThru     = "thru"      // protocol, port: translated on arrival
	setThruAddr = "thru_addr" // address, protocol, port
	mapTo       = "to"        // protocol, port to container
	mapToAddr   = "to_addr"   // address, protocol, port to container
)

var allSets = [...]string{setBridges, setInternal, setSame, setOpen, setMasq, setHairpin, setRouted,
	setIn, setInAddr, setThru, setThruAddr, mapTo, mapToAddr}

var loopback4 = netip.AddrFrom4([4]byte{127, 0, 0, 1})

// late is where our input chain sits: behind every chain that an
// administrator or a firewall program would make.
const late = 500

// family is what differs between IPv4 and IPv6.
type family struct {
	table    nftables.TableFamily
	nf       byte
	size     int    // bytes of an address
	saddr    uint32 // offset of the source address in the header
	daddr    uint32
	addrType nftables.SetDatatype
	// second is the register behind one that an address was loaded into at
	// register 1.
	second uint32
}

// Registers by their 4-byte numbers.
const (
	reg0 = unix.NFT_REG32_00
	reg1 = unix.NFT_REG32_01
	reg2 = unix.NFT_REG32_02
)

var (
	ip4 = family{table: nftables.TableFamilyIPv4, nf: unix.NFPROTO_IPV4, size: 4, saddr: 12, daddr: 16, addrType: nftables.TypeIPAddr, second: unix.NFT_REG32_01}
	ip6 = family{table: nftables.TableFamilyIPv6, nf: unix.NFPROTO_IPV6, size: 16, saddr: 8, daddr: 24, addrType: nftables.TypeIP6Addr, second: unix.NFT_REG32_04}
)

func (f family) is(a netip.Addr) bool { return a.IsValid() && a.Unmap().Is4() == (f.size == 4) }

// target is the type of what a published port leads to.
func (f family) target() nftables.SetDatatype {
	return nftables.MustConcatSetType(f.addrType, nftables.TypeInetService)
}

// change is some elements of one set.
type change struct {
	set   string
	isMap bool
	elems []nftables.SetElement
}

func one(set string, key []byte) change {
	return change{set: set, elems: []nftables.SetElement{{Key: key}}}
}

func (f family) bridgeElements(b Bridge) []change {
	n := ifname(b.Name)
	out := []change{one(setBridges, n)}
	if b.Internal {
		out = append(out, one(setInternal, n))
	}
	if !b.Isolated {
		out = append(out, one(setSame, append(ifname(b.Name), n...)))
	}
	if f.size == 4 && b.Open4 || f.size == 16 && b.Open6 {
		out = append(out, one(setOpen, n))
	}
	noMasq := f.size == 4 && b.NoMasquerade4 || f.size == 16 && b.NoMasquerade6
	for _, s := range b.Subnets {
		if !f.is(s.Addr()) {
			continue
		}
		first, last := s.Masked().Addr().AsSlice(), lastOf(s).AsSlice()
		out = append(out, change{set: setHairpin, elems: []nftables.SetElement{{
			Key: append(ifname(b.Name), first...), KeyEnd: append(ifname(b.Name), last...),
		}}})
		if !noMasq && !b.Internal {
			// Same form as above, with a one-field key: intervals of the
			// other kind could not express the end of the address space.
			out = append(out, change{set: setMasq, elems: []nftables.SetElement{{
				Key: append(pad(f.nf), first...), KeyEnd: append(pad(f.nf), last...),
			}}})
		}
	}
	return out
}

func lastOf(p netip.Prefix) netip.Addr {
	b := p.Addr().AsSlice()
	for i := p.Bits(); i < len(b)*8; i++ {
		b[i/8] |= 1 << (7 - i%8)
	}
	a, _ := netip.AddrFromSlice(b)
	return a
}

func pad(v byte) []byte { return []byte{v, 0, 0, 0} }

func port(p uint16) []byte { return []byte{byte(p >> 8), byte(p), 0, 0} }

func (f family) portElements(ports []Port) []change {
	var in, inAddr, thru, thruAddr, to, toAddr, routed []nftables.SetElement
	for _, p := range ports {
		if !f.is(p.To.Addr()) {
			continue
		}
		if p.Routed {
			routed = append(routed, nftables.SetElement{Key: append(append(p.To.Addr().Unmap().AsSlice(), pad(byte(p.Proto))...), port(p.To.Port())...)})
			continue
		}
		key := append(pad(byte(p.Proto)), port(p.Port)...)
		val := append(p.To.Addr().Unmap().AsSlice(), port(p.To.Port())...)
		if p.Host.IsUnspecified() {
			to = append(to, nftables.SetElement{Key: key, Val: val})
			if p.Through {
				thru = append(thru, nftables.SetElement{Key: key})
			} else {
				in = append(in, nftables.SetElement{Key: key})
			}
			continue
		}
		key = append(p.Host.Unmap().AsSlice(), key...)
		toAddr = append(toAddr, nftables.SetElement{Key: key, Val: val})
		if p.Through {
			thruAddr = append(thruAddr, nftables.SetElement{Key: key})
		} else {
			inAddr = append(inAddr, nftables.SetElement{Key: key})
		}
	}
	return []change{{mapTo, true, to}, {mapToAddr, true, toAddr}, {setIn, false, in}, {setInAddr, false, inAddr},
		{setThru, false, thru}, {setThruAddr, false, thruAddr}, {setRouted, false, routed}}
}

// render queues the chains, rules, sets and elements of one family.
func (t *Table) render(c *nftables.Conn, tab *nftables.Table, f family, id *uint32) error {
	w := &writer{c: c, tab: tab, f: f, id: id, sets: map[string]*nftables.Set{}}
	name := nftables.TypeIFName
	pp := []nftables.SetDatatype{nftables.TypeInetProto, nftables.TypeInetService}
	app := append([]nftables.SetDatatype{f.addrType}, pp...)
	w.set(setBridges, false, name)
	w.set(setInternal, false, name)
	w.set(setOpen, false, name)
	w.set(setSame, false, name, name)
	w.set(setHairpin, true, name, f.addrType)
	w.set(setMasq, true, nftables.TypeNFProto, f.addrType)
	w.set(setRouted, false, app...)
	w.set(setIn, false, pp...)
	w.set(setInAddr, false, app...)
	w.set(setThru, false, pp...)
	w.set(setThruAddr, false, app...)
	w.mapping(mapTo, pp...)
	w.mapping(mapToAddr, app...)
	if w.err != nil {
		return w.err
	}
	var elems []change
	for _, b := range t.bridges {
		elems = append(elems, f.bridgeElements(b)...)
	}
	ports := make([]Port, 0, len(t.ports))
	for p := range t.ports {
		ports = append(ports, p)
	}
	elems = append(elems, f.portElements(ports)...)
	for _, ch := range elems {
		for len(ch.elems) > 0 {
			n := min(piece, len(ch.elems))
			if err := c.SetAddElements(w.sets[ch.set], ch.elems[:n]); err != nil {
				return err
			}
			ch.elems = ch.elems[n:]
		}
	}
	t.chains(w, f)
	return nil
}

func (t *Table) chains(w *writer, f family) {
	in := t.inject

	// The host's loopback addresses are reachable on our bridges, for
	// replies to its own connections; nobody there may address them.
	if f.size == 4 {
		raw := w.chain("early", nftables.ChainTypeFilter, nftables.ChainHookPrerouting, -300)
		w.rule(raw, w.header(f.daddr, 1, reg0), cmp([]byte{127}), w.iifIn(setBridges), verdict(expr.VerdictDrop))
	}

	pre := w.chain("arrive", nftables.ChainTypeNAT, nftables.ChainHookPrerouting, -100)
	if in != nil {
		w.rule(pre, iif(in.In), w.addrKey(mapToAddr), w.dnat())
		w.rule(pre, iif(in.In), w.portKey(mapTo), w.dnat())
		if in.Mark != 0 {
			mark := w.chain("mark", nftables.ChainTypeFilter, nftables.ChainHookPrerouting, -99)
			w.rule(mark, iif(in.In), setMark(in.Mark))
		}
	}
	w.rule(pre, w.local(), w.addrIn(setThruAddr), w.addrKey(mapToAddr), w.dnat())
	w.rule(pre, w.local(), w.portIn(setThru), w.portKey(mapTo), w.dnat())

	out := w.chain("leave", nftables.ChainTypeNAT, nftables.ChainHookOutput, -100)
	if f.size == 16 {
		// The kernel delivers ::1 on the loopback link alone.
		w.rule(out, w.header(f.daddr, 16, unix.NFT_REG_1), []expr.Any{&expr.Cmp{Op: expr.CmpOpEq, Register: unix.NFT_REG_1, Data: netip.IPv6Loopback().AsSlice()}}, verdict(expr.VerdictReturn))
	}
	w.rule(out, w.local(), w.addrKey(mapToAddr), w.dnat())
	w.rule(out, w.local(), w.portKey(mapTo), w.dnat())

	if in != nil {
		input := w.chain("deliver", nftables.ChainTypeFilter, nftables.ChainHookInput, late)
		w.rule(input, iif(in.In), verdict(expr.VerdictDrop))
		w.rule(input, iif("lo"), verdict(expr.VerdictReturn))
		w.rule(input, w.iifIn(setInternal), verdict(expr.VerdictReturn))
		w.rule(input, ctState(expr.CtStateBitNEW), w.local(), w.addrIn(setInAddr), w.dup(in), verdict(expr.VerdictDrop))
		w.rule(input, ctState(expr.CtStateBitNEW), w.local(), w.portIn(setIn), w.dup(in), verdict(expr.VerdictDrop))
	}

	into, outof := w.plain("into"), w.plain("outof")
	fwd := w.chain("forward", nftables.ChainTypeFilter, nftables.ChainHookForward, 0)
	if in != nil && in.Mark != 0 {
		w.rule(fwd, iif(in.In), setMark(0))
	}
	// Nearly every packet: what was let through once goes on.
	w.rule(fwd, ctState(expr.CtStateBitESTABLISHED|expr.CtStateBitRELATED), verdict(expr.VerdictAccept))
	w.rule(fwd, w.oifIn(setBridges), jump("into"))
	w.rule(fwd, w.iifIn(setBridges), jump("outof"))
	if in != nil {
		w.rule(fwd, iif(in.In), verdict(expr.VerdictDrop))
	}

	w.rule(into, pairIn(w, setSame), verdict(expr.VerdictAccept))
	w.rule(into, w.iifIn(setInternal), verdict(expr.VerdictDrop))
	w.rule(into, w.oifIn(setInternal), verdict(expr.VerdictDrop))
	w.rule(into, ctDNAT(), verdict(expr.VerdictAccept))
	w.rule(into, w.oifIn(setOpen), verdict(expr.VerdictAccept))
	w.rule(into, w.addrIn(setRouted), verdict(expr.VerdictAccept))
	w.rule(into, verdict(expr.VerdictDrop))

	w.rule(outof, w.iifIn(setInternal), verdict(expr.VerdictDrop))
	w.rule(outof, verdict(expr.VerdictAccept))

	post := w.chain("depart", nftables.ChainTypeNAT, nftables.ChainHookPostrouting, 100)
	if f.size == 4 {
		w.rule(post, w.oifIn(setBridges), w.header(f.saddr, 1, reg0), cmp([]byte{127}), masquerade())
	}
	w.rule(post, ctDNAT(), w.hairpin(), masquerade())
	w.rule(post, w.masqSource(), w.oifNotIn(setBridges), masquerade())
}

// writer queues one family's objects.
type writer struct {
	c    *nftables.Conn
	tab  *nftables.Table
	f    family
	sets map[string]*nftables.Set
	// id counts the sets of a transaction; the library's own counter is not
	// safe for several connections.
	id    *uint32
	rules int
	err   error
}

func concat(types []nftables.SetDatatype) nftables.SetDatatype {
	if len(types) == 1 {
		return types[0]
	}
	return nftables.MustConcatSetType(types...)
}

func (w *writer) set(name string, interval bool, types ...nftables.SetDatatype) {
	s := &nftables.Set{Table: w.tab, Name: name, Interval: interval, Concatenation: len(types) > 1, KeyType: concat(types)}
	if len(types) == 1 && types[0] == nftables.TypeIFName {
		s.KeyByteOrder = binaryutil.NativeEndian // for those who list it
	}
	w.add(s)
}

func (w *writer) mapping(name string, types ...nftables.SetDatatype) {
	w.add(&nftables.Set{Table: w.tab, Name: name, IsMap: true, Concatenation: true, KeyType: concat(types), DataType: w.f.target()})
}

func (w *writer) add(s *nftables.Set) {
	*w.id++
	s.ID = *w.id
	if err := w.c.AddSet(s, nil); err != nil && w.err == nil {
		w.err = err
	}
	w.sets[s.Name] = s
}

func (w *writer) chain(name string, typ nftables.ChainType, hook *nftables.ChainHook, prio int32) *nftables.Chain {
	policy := nftables.ChainPolicyAccept
	p := nftables.ChainPriority(prio)
	return w.c.AddChain(&nftables.Chain{Name: name, Table: w.tab, Type: typ, Hooknum: hook, Priority: &p, Policy: &policy})
}

func (w *writer) plain(name string) *nftables.Chain {
	return w.c.AddChain(&nftables.Chain{Name: name, Table: w.tab})
}

func (w *writer) rule(ch *nftables.Chain, parts ...[]expr.Any) {
	var all []expr.Any
	for _, p := range parts {
		all = append(all, p...)
	}
	w.rules++
	w.c.AddRule(&nftables.Rule{Table: w.tab, Chain: ch, Exprs: all})
}

func (w *writer) lookup(set string, reg uint32, invert bool) *expr.Lookup {
	return &expr.Lookup{SourceRegister: reg, SetName: set, SetID: w.sets[set].ID, Invert: invert}
}

func (w *writer) iifIn(set string) []expr.Any {
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: unix.NFT_REG_1}, w.lookup(set, unix.NFT_REG_1, false)}
}

func (w *writer) oifIn(set string) []expr.Any {
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyOIFNAME, Register: unix.NFT_REG_1}, w.lookup(set, unix.NFT_REG_1, false)}
}

func (w *writer) oifNotIn(set string) []expr.Any {
	return []expr.Any{&expr.Meta{Key: expr.MetaKeyOIFNAME, Register: unix.NFT_REG_1}, w.lookup(set, unix.NFT_REG_1, true)}
}

func pairIn(w *writer, set string) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: unix.NFT_REG_1},
		&expr.Meta{Key: expr.MetaKeyOIFNAME, Register: unix.NFT_REG_2},
		w.lookup(set, unix.NFT_REG_1, false),
	}
}

func (w *writer) hairpin() []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyOIFNAME, Register: unix.NFT_REG_1},
		&expr.Payload{DestRegister: unix.NFT_REG_2, Base: expr.PayloadBaseNetworkHeader, Offset: w.f.saddr, Len: uint32(w.f.size)},
		w.lookup(setHairpin, unix.NFT_REG_1, false),
	}
}

func (w *writer) masqSource() []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyNFPROTO, Register: reg0},
		&expr.Payload{DestRegister: reg1, Base: expr.PayloadBaseNetworkHeader, Offset: w.f.saddr, Len: uint32(w.f.size)},
		w.lookup(setMasq, reg0, false),
	}
}

func (w *writer) header(offset, size, reg uint32) []expr.Any {
	return []expr.Any{&expr.Payload{DestRegister: reg, Base: expr.PayloadBaseNetworkHeader, Offset: offset, Len: size}}
}

// local matches packets for an address of this host.
func (w *writer) local() []expr.Any {
	return []expr.Any{
		&expr.Fib{Register: reg0, FlagDADDR: true, ResultADDRTYPE: true},
		&expr.Cmp{Op: expr.CmpOpEq, Register: reg0, Data: binaryutil.NativeEndian.PutUint32(unix.RTN_LOCAL)},
	}
}

func (w *writer) loadPort() []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: reg0},
		&expr.Payload{DestRegister: reg1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
	}
}

func (w *writer) loadAddrPort() []expr.Any {
	a := uint32(reg1)
	if w.f.size == 16 {
		a = unix.NFT_REG32_04
	}
	return []expr.Any{
		&expr.Payload{DestRegister: reg0, Base: expr.PayloadBaseNetworkHeader, Offset: w.f.daddr, Len: uint32(w.f.size)},
		&expr.Meta{Key: expr.MetaKeyL4PROTO, Register: a},
		&expr.Payload{DestRegister: a + 1, Base: expr.PayloadBaseTransportHeader, Offset: 2, Len: 2},
	}
}

func (w *writer) portIn(set string) []expr.Any {
	return append(w.loadPort(), w.lookup(set, reg0, false))
}

func (w *writer) addrIn(set string) []expr.Any {
	return append(w.loadAddrPort(), w.lookup(set, reg0, false))
}

func (w *writer) mapped(set string) *expr.Lookup {
	l := w.lookup(set, reg0, false)
	l.DestRegister, l.IsDestRegSet = reg0, true
	return l
}

func (w *writer) portKey(set string) []expr.Any { return append(w.loadPort(), w.mapped(set)) }

func (w *writer) addrKey(set string) []expr.Any { return append(w.loadAddrPort(), w.mapped(set)) }

// dnat sends the connection to the address and port that a map gave.
func (w *writer) dnat() []expr.Any {
	return []expr.Any{&expr.NAT{Type: expr.NATTypeDestNAT, Family: uint32(w.f.nf), RegAddrMin: reg0, RegProtoMin: w.f.second, Specified: true}}
}

func (w *writer) dup(in *Injection) []expr.Any {
	to := in.To4
	if w.f.size == 16 {
		to = in.To6
	}
	dev := make([]byte, 4)
	binary.NativeEndian.PutUint32(dev, uint32(in.OutIndex))
	return []expr.Any{
		&expr.Immediate{Register: unix.NFT_REG_1, Data: to.AsSlice()},
		&expr.Immediate{Register: unix.NFT_REG_2, Data: dev},
		&expr.Dup{RegAddr: unix.NFT_REG_1, RegDev: unix.NFT_REG_2, IsRegDevSet: true},
	}
}

func iif(name string) []expr.Any {
	return []expr.Any{
		&expr.Meta{Key: expr.MetaKeyIIFNAME, Register: unix.NFT_REG_1},
		&expr.Cmp{Op: expr.CmpOpEq, Register: unix.NFT_REG_1, Data: ifname(name)},
	}
}

func cmp(b []byte) []expr.Any {
	return []expr.Any{&expr.Cmp{Op: expr.CmpOpEq, Register: reg0, Data: b}}
}

func setMark(m uint32) []expr.Any {
	return []expr.Any{
		&expr.Immediate{Register: unix.NFT_REG_1, Data: binaryutil.NativeEndian.PutUint32(m)},
		&expr.Meta{Key: expr.MetaKeyMARK, SourceRegister: true, Register: unix.NFT_REG_1},
	}
}

func ctBits(key expr.CtKey, mask uint32) []expr.Any {
	return []expr.Any{
		&expr.Ct{Key: key, Register: unix.NFT_REG_1},
		&expr.Bitwise{SourceRegister: unix.NFT_REG_1, DestRegister: unix.NFT_REG_1, Len: 4,
			Mask: binaryutil.NativeEndian.PutUint32(mask), Xor: []byte{0, 0, 0, 0}},
		&expr.Cmp{Op: expr.CmpOpNeq, Register: unix.NFT_REG_1, Data: []byte{0, 0, 0, 0}},
	}
}

func ctState(mask uint32) []expr.Any { return ctBits(expr.CtKeySTATE, mask) }

// ctDNAT matches connections whose destination was translated (IPS_DST_NAT).
func ctDNAT() []expr.Any { return ctBits(expr.CtKeySTATUS, 1<<5) }

func verdict(k expr.VerdictKind) []expr.Any { return []expr.Any{&expr.Verdict{Kind: k}} }

func jump(chain string) []expr.Any {
	return []expr.Any{&expr.Verdict{Kind: expr.VerdictJump, Chain: chain}}
}

func masquerade() []expr.Any { return []expr.Any{&expr.Masq{}} }
