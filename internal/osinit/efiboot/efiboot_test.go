package efiboot

import (
	"encoding/hex"
	"os"
	"path/filepath"
	"slices"
	"testing"
)

func loader(file string) Loader {
	return Loader{Name: "CloudOS", Number: 2, First: 4096, Sectors: 0x50000, ID: [16]byte{1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16}, File: file}
}

func variable(t *testing.T, dir, name, content string) {
	t.Helper()
	b, err := hex.DecodeString(content)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, name+global), b, 0o600); err != nil {
		t.Fatal(err)
	}
}

// TestOption compares an entry with the specification's bytes.
func TestOption(t *testing.T) {
	const want = "01000000" + "5400" + "43006c006f00750064004f0053000000" +
		"04012a00" + "02000000" + "0010000000000000" + "0000050000000000" + "0102030405060708090a0b0c0d0e0f10" + "0202" +
		"04042600" + "5c0063006c006f00750064006f0073005c0062005c0073002e006500660069000000" + "7fff0400"
	if got := hex.EncodeToString(loader(`\cloudos\b\s.efi`).option()); got != want {
		t.Fatalf("the entry is\n%s, want\n%s", got, want)
	}
}

func TestOrder(t *testing.T) {
	dir := t.TempDir()
	v := Vars{Dir: dir}
	// What firmware has of its own, and an order that names an entry which is gone.
	variable(t, dir, "Boot0000", "07000000"+"01000000"+"0400"+"41000000"+"7fff0400")
	variable(t, dir, "BootOrder", "07000000"+"00000100")
	a, err := v.Ensure(loader(`\cloudos\a\system.efi`))
	if err != nil || a != 2 {
		t.Fatalf("entry %d, %v", a, err)
	}
	b, err := v.Ensure(loader(`\cloudos\b\system.efi`))
	if err != nil || b != 3 {
		t.Fatalf("entry %d, %v", b, err)
	}
	if again, err := v.Ensure(loader(`\cloudos\a\system.efi`)); err != nil || again != a {
		t.Fatalf("a second entry %d for the same, %v", again, err)
	}
	for _, c := range []struct{ first, without, want []uint16 }{
		{[]uint16{a}, []uint16{b}, []uint16{2, 0, 1}},
		{[]uint16{b, a}, nil, []uint16{3, 2, 0, 1}},
		{[]uint16{b}, []uint16{a}, []uint16{3, 0, 1}},
	} {
		if err := v.Prefer(c.first, c.without); err != nil {
			t.Fatal(err)
		}
		if got, err := v.Order(); err != nil || !slices.Equal(got, c.want) {
			t.Fatalf("the order is %v, want %v, %v", got, c.want, err)
		}
	}
	if err := v.Once(b); err != nil {
		t.Fatal(err)
	}
	if next, err := v.numbers("BootNext"); err != nil || !slices.Equal(next, []uint16{b}) {
		t.Fatalf("next is %v, %v", next, err)
	}
	for range 2 {
		if err := v.NotOnce(); err != nil {
			t.Fatal(err)
		}
	}
	if next, err := v.numbers("BootNext"); err != nil || next != nil {
		t.Fatalf("next is %v, %v", next, err)
	}
	st, err := os.Stat(v.file("BootOrder"))
	if err != nil {
		t.Fatal(err)
	}
	if err := v.Prefer([]uint16{b}, nil); err != nil {
		t.Fatal(err)
	}
	if now, err := os.Stat(v.file("BootOrder")); err != nil || !now.ModTime().Equal(st.ModTime()) {
		t.Fatal("an order that was right was written again")
	}
}

// TestDamaged reads variables that hostile or broken firmware has.
func TestDamaged(t *testing.T) {
	dir := t.TempDir()
	v := Vars{Dir: dir}
	variable(t, dir, "BootOrder", "07000000"+"05")
	variable(t, dir, "Boot0005", "")
	variable(t, dir, "BootZZZZ", "07000000")
	if order, err := v.Order(); err != nil || len(order) > 0 {
		t.Fatalf("%v, %v", order, err)
	}
	if _, ok, err := v.Find(loader(`\x`)); ok || err != nil {
		t.Fatal(ok, err)
	}
	if n, err := v.Ensure(loader(`\x`)); err != nil || n != 0 {
		t.Fatalf("%d, %v", n, err)
	}
}
