package format

import (
	"fmt"
	"time"
	"unicode/utf8"

	"github.com/docker/go-units"
)

// Duration is a length of time in one unit, as people say it.
func Duration(d time.Duration) string {
	if d < 0 {
		d = 0
	}
	return units.HumanDuration(d)
}

// Ago is a point in time as its distance from now.
func Ago(t, now time.Time) string {
	if t.IsZero() || t.Unix() <= 0 {
		return "N/A"
	}
	return Duration(now.Sub(t)) + " ago"
}

// Size is a size in powers of 1000 with three digits: "12.3MB".
func Size(n int64) string { return units.HumanSizeWithPrecision(float64(n), 3) }

// BinarySize is a size in powers of 1024: "1.5GiB".
func BinarySize(n uint64) string { return units.BytesSize(float64(n)) }

// Ellipsis shortens s to n characters, the last a mark that it goes on.
func Ellipsis(s string, n int) string {
	if utf8.RuneCountInString(s) <= n || n < 1 {
		return s
	}
	return string([]rune(s)[:n-1]) + "…"
}

// Percent is a share with two digits.
func Percent(p float64) string { return fmt.Sprintf("%.2f%%", p) }
