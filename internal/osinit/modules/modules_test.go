package modules

import "testing"

func TestMatch(t *testing.T) {
	for _, c := range []struct {
		pattern, s string
		want       bool
	}{
		{"virtio:d00000002v*", "virtio:d00000002v00001AF4", true},
		{"virtio:d00000002v*", "virtio:d00000003v00001AF4", false},
		{"pci:v00008086d*sv*sd*bc01sc06i01*", "pci:v00008086d00002922sv00001AF4sd00001100bc01sc06i01", true},
		{"cpu:type:x86,ven*fam*mod*:feature:*0[0-9]8[5]*", "cpu:type:x86,ven0002fam:feature:,0985,", false},
		{"a[b-d]e", "ace", true}, {"a[b-d]e", "aee", false}, {"a?c", "abc", true}, {"a?c", "ac", false}, {"", "", true}, {"*", "x", true}, {"a[", "a[", false},
		{"nft-expr-2-nat", "nft-expr-2-nat", true},
	} {
		if got := match(c.pattern, c.s); got != c.want {
			t.Errorf("%q %q: %t", c.pattern, c.s, got)
		}
	}
}

func TestParse(t *testing.T) {
	text := []byte("m virtio kernel/v.ko \nm virtio_blk kernel/b.ko virtio\na virtio:d2v* virtio_blk\n")
	s := newSet(nil, func() ([]byte, error) { return text, nil })
	if !s.Has("virtio-blk") || len(s.Match("virtio:d2v1")) != 1 || s.Match("virtio_blk")[0] != "virtio_blk" {
		t.Fatal("the list is not what was written")
	}
	if s := newSet(nil, func() ([]byte, error) { return []byte("x\n"), nil }); s.Has("x") || s.Load("x") == nil || s.Match("x") != nil {
		t.Error("a bad list passes for an empty one")
	}
	for _, bad := range []string{"m a ../../x b\n", "x\n", "m a\n"} {
		if _, err := parse([]byte(bad)); err == nil {
			t.Errorf("%q was read", bad)
		}
	}
}

func FuzzMatch(f *testing.F) {
	f.Add("a*b[c-d]?", "axxbcz")
	f.Fuzz(func(t *testing.T, pattern, s string) {
		if len(pattern) > 40 || len(s) > 60 {
			return
		}
		match(pattern, s)
		if !match("*", s) {
			t.Fatal("* does not match")
		}
	})
}
