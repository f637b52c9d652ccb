package nft

import (
	"bytes"
	"encoding/binary"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
)

// view is what a table held when it was read.
type view struct {
	rules map[string][]*nftables.Rule
	sets  map[string][]nftables.SetElement
}

func newView(c *nftables.Conn, tab *nftables.Table, chains []*nftables.Chain) *view {
	v := &view{rules: map[string][]*nftables.Rule{}, sets: map[string][]nftables.SetElement{}}
	for _, ch := range chains {
		if ch.Table.Name != tab.Name || ch.Table.Family != tab.Family {
			continue
		}
		if rules, err := c.GetRules(tab, ch); err == nil { // else it went meanwhile
			v.rules[ch.Name] = rules
		}
	}
	sets, err := c.GetSets(tab)
	if err != nil {
		return v
	}
	for _, s := range sets {
		// Only sets that may hold names of links or states are of interest.
		if s.IsMap || s.Interval || s.Concatenation {
			continue
		}
		if es, err := c.GetSetElements(s); err == nil {
			v.sets[s.Name] = es
		}
	}
	return v
}

type fate uint8

const (
	none fate = iota
	accepted
	dropped
)

// maxDepth bounds the jumps that are followed; the kernel allows 16.
const maxDepth = 16

// walk carries a new packet from one link to another through a chain.
func (v *view) walk(chain, in, out string, depth int) fate {
	if depth > maxDepth {
		return none
	}
	for _, r := range v.rules[chain] {
		kind, to := v.match(r, in, out)
		switch kind {
		case expr.VerdictAccept:
			return accepted
		case expr.VerdictDrop:
			return dropped
		case expr.VerdictReturn:
			return none
		case expr.VerdictJump, expr.VerdictGoto:
			if w := v.walk(to, in, out, depth+1); w != none || kind == expr.VerdictGoto {
				return w
			}
		}
	}
	return none
}

// stateNew is the bit of a new connection in what "ct state" loads.
const stateNew = 8

// match gives the verdict of a rule, VerdictContinue if it has none or does
// not match.
func (v *view) match(r *nftables.Rule, in, out string) (expr.VerdictKind, string) {
	regs := map[uint32][]byte{}
	for _, e := range r.Exprs {
		switch x := e.(type) {
		case *expr.Counter, *expr.Log:
		case *expr.Meta:
			switch {
			case x.SourceRegister: // sets something
			case x.Key == expr.MetaKeyIIFNAME:
				regs[x.Register] = ifname(in)
			case x.Key == expr.MetaKeyOIFNAME:
				regs[x.Register] = ifname(out)
			default:
				return expr.VerdictContinue, ""
			}
		case *expr.Ct:
			if x.SourceRegister {
				continue
			}
			if x.Key != expr.CtKeySTATE {
				return expr.VerdictContinue, ""
			}
			regs[x.Register] = binary.NativeEndian.AppendUint32(nil, stateNew)
		case *expr.Bitwise:
			have := regs[x.SourceRegister]
			if len(have) < int(x.Len) || len(x.Mask) < int(x.Len) || len(x.Xor) < int(x.Len) {
				return expr.VerdictContinue, ""
			}
			res := make([]byte, x.Len)
			for i := range res {
				res[i] = have[i]&x.Mask[i] ^ x.Xor[i]
			}
			regs[x.DestRegister] = res
		case *expr.Cmp:
			have, ok := regs[x.Register]
			// A shorter name than the register's is a prefix: "br*".
			if !ok || x.Op != expr.CmpOpEq && x.Op != expr.CmpOpNeq || bytes.HasPrefix(have, x.Data) != (x.Op == expr.CmpOpEq) {
				return expr.VerdictContinue, ""
			}
		case *expr.Lookup:
			have, ok := regs[x.SourceRegister]
			es, known := v.sets[x.SetName]
			if !ok || !known || x.IsDestRegSet {
				return expr.VerdictContinue, ""
			}
			hit := false
			for _, el := range es {
				hit = hit || len(el.Key) > 0 && bytes.HasPrefix(have, el.Key)
			}
			if hit == x.Invert {
				return expr.VerdictContinue, ""
			}
		case *expr.Reject:
			return expr.VerdictDrop, ""
		case *expr.Target:
			if x.Name == "REJECT" {
				return expr.VerdictDrop, ""
			}
		case *expr.Verdict:
			return x.Kind, x.Chain
		default:
			return expr.VerdictContinue, ""
		}
	}
	return expr.VerdictContinue, ""
}
