"""Classes of characters of Unicode 16.0 for the rule `unicode_word`: written by `make_word_classes`.

`CLASSES` has the properties of each class; `TABLE` is base85 of zlib of the class of each code point, one byte each.
From the Unicode Character Database, https://www.unicode.org/license.txt.
"""

CLASSES = (
    "",
    "WB=Extend",
    "WB=Format",
    "WB=ZWJ",
    "WB=Katakana",
    "WB=Hebrew_Letter",
    "WB=ALetter",
    "WB=MidNum",
    "WB=Numeric",
    "WB=Regional_Indicator",
    "Extended_Pictographic",
    "Extended_Pictographic WB=ALetter",
    "P",
    "P WB=Katakana",
    "P WB=ALetter",
    "P WB=Single_Quote",
    "P WB=Double_Quote",
    "P WB=MidNumLet",
    "P WB=MidLetter",
    "P WB=MidNum",
    "P WB=Numeric",
    "P WB=ExtendNumLet",
    "Extended_Pictographic P",
    "Ll WB=ALetter",
    "Extended_Pictographic Ll WB=ALetter",
    "Lu WB=ALetter",
    "White_Space",
    "WB=CR White_Space",
    "WB=LF White_Space",
    "WB=Newline White_Space",
    "WB=ExtendNumLet White_Space",
    "WB=WSegSpace White_Space",
    "U+0020 WB=WSegSpace White_Space",
)
TABLE = (
    "c-rmViDKKhwE$4iP1w|frj1>Xs(CM+{{L5&JHegQ;w|Smi7bgEK;RMpDTN53@yGxF{P}-j;=l2qF~s<f7-M*jKjOE}({u55jORt=Dlg%*sMv0k$j`9ok9wIH"
    "9`hI;9_trR@hOD7d}k^7&^#`s-DT^1;m`I98$Zoj%`fGjavSG!|KxP;7CW~o)NfV4obqy+yl~D>&7bW&HH)3kr^|nulB;uZZZbW1?>hO~dpp&Evb|jP%E~gz"
    "!}(O?t=OCAbDhugQx&tJuHX4kKJO{qI)+x_x?U(Wb$8s+y4;SYkd({?Ki3_FhkwGpVk)Zl`}gnh`_t}%dj4LA!l7u2#ZUdGZ7;trYv2C<l(esPTVA!~;rV%x"
    "e0(Tc@O;179QOT1{MU1_wJg8C*k<KhvpZ$pLj6mhpQ@3_<3QNV;7VoeX>Kl*q>>N&$HD&W+(@zGv8aopvX`=4E!8jIJuAaxTwu$omEHEZNnUKPn};eElQ6t8"
    "{K_EMJc=%^lbJO0$u^4vDH%1zxpL}DsQ$ZBK*eKIibWyiUF6k&`{2mxvJO=O!zk%vCy(`7p|77k>9>DEeN1I_ebrlPQf{-DPolIcnJo61NcX==WLNsb{jV}o"
    "r$0J8!g&9?l=EcGW92_hKi&U!pBBo0lEGptefhWPG%JVpxB8u7*1E%_Nia+IKU-=gCaI^vx>Eep*VFy)({DCf=Qp30f3w7(8sfq9!;bVrR{`Vl&$IFV?+L%z"
    "24IqY*TyAB!R-Ebbvcaxv~u&!f(U)EwpHHdC-j}txc;;B=sPa!8s|wEl~tJ>X;&q)BmF@R+E<n%eO?}>eOgRHXm)#50hfyo51m~nCG*3$Y}|$I8V80!b6+1="
    ")gIL2xm%a~Tn^IuZj%n7?-rV7xzF%8at50XS=v*S3+^0l*XL2izXwiDVt(L!lC9WoJJ7ai8azL`{<Z0Z8|}wcB~pfV->NLMKeN{@dgr@nkCURA5V^cs8!?Tx"
    "KUYrUW4P%l_3&y&Sh_+u=%D7$`;w!1?)}B%JJbWddvwHu;Y2xxDf5_x&GAq&?kU!M$i~axFBX#R?>Pm}@*CzStX1$}!SQfwZupg+--kE$?O;~cE~Z>Oh}=7j"
    "4Pg>*<LBL&yy-;uj))Is_42E6!;3wGNSO5d(@fR}-GRhL*Do*3aeC}udS$Jxnn8W#NAnkB@<GAT@lLhycz9KxO)XsH%i5+S@6Oc^eJ*vK-JfwCN$wV(N4>wF"
    "Yd@X6Af>_QTWuWn@iG4VYis#%u78%+Z`T`F_O9ol-d-L~bp&_M>+OZ+c^cp6_Jz^%f7bpe{)X%?4-f6}^y5cAFerX~`uX#r^q=%X$?q|~ycCarZJxAE^-I6V"
    "pVeC7p)<Jt8Dl;gjD*#bp&N{irai>Dy>ifg0)MJr>I&?!t;+Iw{b6^Rw}02ATyLT-^$<>b``1*xy=0xo%4kEA7r3SADf+O$AMbQIv)lf?H}lwQo_^rkN)Mmk"
    "4v+airnJHyZxJ_DC^QlAn1;vWtD6neS51Gg|81#0_67X7(h@&5Z#V1Jn;7lV=p%;Bnpvvg*{7Qu+?_H9kHi~wJySRD&*qj<mtnaxyr`NVZ`hf?hFAFh-?{%<"
    "-nsoEYjaL>-S<#;pW`*VTKrm_@%9Hua{XadGq68he*Llg%FX!89~*;}>9<dgJ?^+xd_=yrz_2;fw7hqJR$t;9ju7T+u#T7Czm%HL{QZs@%d#q&zkj)#nC!{1"
    "kB9Sne=4&7`oYm+9T&oT?U66-Ll4G4xL0s#SpWb400000000000000000000000000002s^T`3;gI90QVpQmZ;+T}jx6XX^9Gi(bucjPMW*^R1mo65+^)9wE"
    "9`BEv(OlA3&PAOk6Jwvw>AqG8<tu5_vuB@Y=FDzhDrdGnmvdFOuP+@TRdT1cM4G>Owpe6^a?R{U<A=2TFR9__EY|JTV(jC!-Tqh~>P4_;X?$;|xY%CI=BCWh"
    "R(sdy=)&C}&c2-w_rEFUBuC@&xiHnV{<D6O;r2IX03VjrPFcNLvug3Mx{X17^);9#+}6bSaTwp-<7vNYh5lK+z0-{ysJS?<ALD-j00000000000Jyy!-?zW$"
    "tGxdABLDyZ0000003Tg*8@<U()o)+3ubuEU6`Fs;*XB>_b-xWX%NM3z&5`@a?ycQBMa4}1%ID*|qsADY(mUkNy#MkN7reZ@JjWm5`Dt)Z(rQbwxff}j@Voh9"
    "-9xBy7=M%xMc$M9$38um*^cK$<ti^LH}s6vPFKEMX!G8%VfhB88$t2#@Gyyom2~D`3mefJ-g9GBrN4fQ+B@a{y>x!r+h<{4bYEV!*_HKoVBrJt(BDIOW0P_3"
    "E_XfB!2mn&bi?}*AF9mp{fhVGH5u2fI&%D8bG#?TopvYVeF^<zn*H&vg#PjR{1_}=Io#SR;jJcrv*%sziEr5c7LSJ_A=GX2@_$E&8}YR_{_fGggt_`zNH%T_"
    "AMV=!Z5GV+1ypuL{oVBI@n+bJ$nNI-lkT-2_V4Q7<F&QFW9&M(-+vrU|8a5YHyhe}{O=!9BpH3{@z*PiY0t;aUB5Zv@cyS0UW~^h<M~4tv)s&gvm;Btlmh`)"
    "6yIEncX{k>&b^W(vYy}3%qVgB;GJK0|G|Fr*xTB(?7}IQve{W^mU7V_C0RA8)BY-0NjJuCWt!>aHY@S8aQyB}e>D3|zm=*FNcL#Ywu&{bDgWtoMpZG?GrT12"
    "QOtKl)xJwT(}e5#E^G59$A2^a49j_m7xh<@Ig94zhYIQCtHmMV_^MYqbyc_J`ft`X6v@eb^H!6C@dQz60{chdq2IAGsjS|OIv%n-wijFL9lU-2KR>Bf6%px?"
    "5z6?;Z#(|Tvbn_j18Q8qpQryzcR#r<zi=sjH0-@!`Ny<1o0k7@da|q1AJ%!?8jsx|5@u$Z8_jR_3yr^~eg13Y@7n8<8&Qz7{DX7JuwDjjdtbJ;)gch>)&3m*"
    "TyWe%6m4U+asEG;7;$$BdD{A9Guz9qYgwup8YivBt<P6i8>i23{Kln`_-OrbsFFh84iC$2EB?1;+?|`TbCBR<ip?91Kl39W-BcsF(B~@8*2{O#=DUWa-r@%x"
    "&wPO6qi$TfE`BucZ8*@xhUo|_In%w*{@iwR=D&vb{So8Gxc<L$r^Z7qH3a~G>lJr&uj{G6r}r?D&3<^JeE|RffOo?AIX8_Z00000004Mv>mO@P??d8#8~}X&"
    "{two_@w2tmaJ&?6eZQ&Y``ImIdVJ@~qY0*WU2WG-|3~f2`0&t|@3cstxcwa5AMSJP|F!pLUD)ia-H`LfEn=2umua#yxozt8`!~G*YnC}?0RR910000000000"
    "0002st$is}|J0A+iz3-7uM1Y1DRTe-cn98ezTx!wBtN0NSy_B2s3iaZ0N@Docab`Jm;UwJ_rp?<b;0(~m;}}KM&9Ypso@Xnl9^jJ*9jM_GnY=0yCR37ekg=="
    "ozNu{u1%-ja9<ehFJXI~X8FD(!xiOboyA##7FSy?@34{LXIt}>j&AqT0veiJI9=7nlU#+-fFY~r`--!pCIfBYPWo;%U!I<Db*jQo(f)_!OC6zow_5%tlg6%O"
    "=e76$X!e^z>0TI)q)gv>-}=a|s=u=0jC_CH`1uv;f9nXyM-y_3m|x;}2+cp^_z0hAF8XvlbN%(ty)#&!PVJbW+}?P;dl3k{=l)@>6R7%(^2BD;XN0^x*~#mF"
    "@_Lzm`R=vqd6G;RY-FV?YBLzt-sdWhzqoN>Y!%nmAY|?RGQHn^OJ7T$Rhv&M<c5{?w?$#GJZ6g`&0rWT|HubZ4O$h$Em{vHvD|3A@BZhl``owg)W@q`o8<VF"
    "%h!LMXt`qRVfI%(b$j*Ejjw-;0MPmY000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000"
    "000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000"
    "000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000"
    "000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000"
    "000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000"
    "000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000"
    "000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000"
    "000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000"
    "000000000000000000000POa#{&sd}Z@v53FGj!v00000000000000000000000000000000000000000000000000000000000000000000000000000000"
    "000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000"
    "0000000000000000000000000000000000009*bCk_Q-k"
)
