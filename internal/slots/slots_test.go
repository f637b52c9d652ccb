package slots

import (
	"strings"
	"testing"
)

func TestBlock(t *testing.T) {
	for _, s := range []State{{Good: "a"}, State{Good: "a"}.Start("b"), {Good: "b", Try: "a", Left: 0}} {
		b, err := s.Block()
		if err != nil || len(b) != Size {
			t.Fatal(err)
		}
		if got, err := Parse(b); err != nil || got != s {
			t.Errorf("%+v became %+v, %v", s, got, err)
		}
	}
	if !(State{Good: "a", Try: "b"}).Fallen() || (State{Good: "a"}).Fallen() || (State{Good: "a"}).Start("b").Confirm("b") != (State{Good: "b"}) || Other("b") != "a" {
		t.Error("the states are wrong")
	}
	for _, bad := range []State{{}, {Good: "c"}, {Good: "a", Try: "x"}, {Good: "a", Left: Tries + 1}} {
		if _, err := bad.Block(); err == nil {
			t.Errorf("%+v was written", bad)
		}
	}
}

func FuzzParse(f *testing.F) {
	b, _ := State{Good: "a"}.Start("b").Block()
	f.Add(string(b))
	f.Add(strings.Repeat("#", Size))
	f.Fuzz(func(t *testing.T, s string) {
		st, err := Parse([]byte(s))
		if err != nil {
			return
		}
		if _, err := st.Block(); err != nil {
			t.Fatal(err)
		}
	})
}
