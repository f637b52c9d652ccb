package criu

import "testing"

func TestProtobuf(t *testing.T) {
	var in, out Message
	in.Str(1, "net-lock")
	in.Int(2, -7)
	out.Int(1, notify)
	out.Bool(2, true)
	out.Bytes(5, in)
	f, err := ReadFields(out)
	if err != nil || f.Num[1] != notify || f.Num[2] != 1 {
		t.Fatalf("%+v %v", f, err)
	}
	n, err := ReadFields(f.Data[5])
	if err != nil || string(n.Data[1]) != "net-lock" || int32(n.Num[2]) != -7 {
		t.Fatalf("%+v %v", n, err)
	}
	for _, bad := range []string{"\x00", "\x0a\x05ab", "\x08", "\x0b", "\x09abc", "\x08\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff"} {
		if f, err := ReadFields([]byte(bad)); err == nil {
			t.Errorf("%q: %+v", bad, f)
		}
	}
}

func FuzzProtobuf(f *testing.F) {
	f.Add([]byte("\x08\x06\x10\x01\x2a\x02\x0a\x00"))
	f.Fuzz(func(_ *testing.T, b []byte) {
		if m, err := ReadFields(b); err == nil {
			for _, d := range m.Data {
				_, _ = ReadFields(d)
			}
		}
	})
}
